"""The command line: options become typed runs, runs become files. It stands above `qdiff`, `ddim` and `ldm`."""

import importlib.util
import sys
from pathlib import Path


def _expect_own_packages() -> None:
    """End with one line if another `qdiff`, `ddim` or `ldm` comes first on the path of Python."""
    own = Path(__file__).resolve().parent.parent
    for name in ("qdiff", "ddim", "ldm"):
        found = importlib.util.find_spec(name)
        origin = Path(found.origin) if found and found.origin else None
        if origin is None or origin.resolve().parent.parent != own:
            place = origin.parent if origin else "nothing"
            sys.exit(f"error: the package {name}: expected {own / name}, found {place}; take it off PYTHONPATH")


_expect_own_packages()
