"""The command line: parses options into typed runs and writes the files of a run. Uses `qdiff`, `ddim` and `ldm`."""

import importlib.util
import sys
from pathlib import Path


def _expect_own_packages() -> None:
    """Exit with an error if Python finds another package of the name `qdiff`, `ddim` or `ldm` first."""
    root = Path(__file__).resolve().parent.parent
    for name in ("qdiff", "ddim", "ldm"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin is None or origin.resolve().parent.parent != root:
            found = origin.parent if origin else "nothing"
            sys.exit(f"error: the package {name}: expected {root / name}, found {found}; take it off PYTHONPATH")


_expect_own_packages()
