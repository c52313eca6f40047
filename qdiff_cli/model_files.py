"""Where the full-precision checkpoint of a command lies: a file, a folder, or a repository of the Hugging Face hub."""

from pathlib import Path

from qdiff.checkpoint.diffusers_folder import DiffusersFolder, needed_files
from qdiff.utils.hub import fetch_repository, is_repository_id

CHECKPOINT_HELP = (
    "full-precision checkpoint: a file (.ckpt, .pth, .safetensors), the folder of a model, which may be one of "
    "diffusers, or the id of a repository of the Hugging Face hub"
)


def local_checkpoint(path: Path) -> Path:
    """Return the path of a checkpoint; the id of a repository becomes the folder of its local copy.

    Raises:
        ConfigError: the repository can neither be reached nor is it in the cache.
    """
    return fetch_repository(path, needed_files) if is_repository_id(path) else path


def holds_config(path: Path | None) -> bool:
    """Whether a checkpoint holds its configuration: a folder of diffusers, or a repository of the hub."""
    return path is not None and (is_repository_id(path) or DiffusersFolder.find(path) is not None)
