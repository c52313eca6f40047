"""Files that come with the project: YAML configurations and the bundled models.

A clone holds them beside the packages, in `configs/` and `models/`. An installed package contains the configurations
only, as package data.
"""

from pathlib import Path

from qdiff.errors import ConfigError

CLONE = Path(__file__).resolve().parents[2]
INSTALLED = Path(__file__).resolve().parents[1] / "data"


def find(name: str | Path) -> Path:
    """Look a file or folder up in the working directory, then among the files of the project.

    Args:
        name: a path. A relative path may also name a file of the project (`configs/cifar10.yml`, `models/ldm/emoji64`)
            or a configuration without its folder (`cifar10.yml`).

    Returns:
        The first path that exists; if none does, `name` itself.
    """
    places = [Path(), *(root for root in (CLONE, CLONE / "configs") if is_clone()), INSTALLED, INSTALLED / "configs"]
    return next((place / name for place in places if (place / name).exists()), Path(name))


def is_clone() -> bool:
    """Whether the packages are imported from a clone of the repository."""
    return (CLONE / "configs").is_dir() and (CLONE / "pyproject.toml").is_file()


def clone() -> Path:
    """The root of the clone that the packages are imported from.

    Raises:
        ConfigError: the packages were installed without the clone.
    """
    if not is_clone():
        raise ConfigError("the bundled models are part of a clone of the repository, not of the installed package")
    return CLONE
