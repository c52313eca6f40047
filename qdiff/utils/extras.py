"""Optional dependencies, which an extra of this project installs (`pip install "qdiff[eval]"`)."""

import importlib.util

from qdiff.errors import MissingExtra


def require_extra(extra: str, *packages: str) -> None:
    """Check that packages can be imported, before work that needs them.

    Args:
        extra: the extra that installs them: `eval`, `export`, `diffusers` or `dev`.
        packages: names of modules.

    Raises:
        MissingExtra: a package is not installed. The message names it and the extra.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f'{package} is not installed: expected the extra "{extra}" (pip install "qdiff[{extra}]")'
            )
