"""Repositories of the Hugging Face hub by their ids, such as `google/ddpm-cifar10-32`."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from qdiff.errors import ConfigError

FILE_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors", ".bin", ".yaml", ".yml")
TIMEOUT = 10  # seconds for the first answer of the hub


def is_repository_id(path: Path) -> bool:
    """Whether a path that names no file or folder has the form of a repository's id: `owner/name`."""
    has_form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix()) is not None
    return has_form and path.suffix not in FILE_SUFFIXES and not path.exists()


def fetch_repository(path: Path, needed: Callable[[Iterable[str]], list[str]]) -> Path:
    """Return the local copy of a repository. It is downloaded if the hub can be reached, else taken from the cache.

    Args:
        path: the id of the repository.
        needed: selects the files to download from the names of all files.

    Raises:
        ConfigError: the hub cannot be reached or has no such repository, and the cache does not hold it.
    """
    from huggingface_hub import HfApi, snapshot_download

    name = path.as_posix()
    try:
        names = [file.rfilename for file in HfApi().model_info(name, timeout=TIMEOUT).siblings or []]
        return Path(snapshot_download(name, allow_patterns=needed(names)))
    except (
        Exception
    ) as error:  # its class belongs to the HTTP library of the hub's client, which depends on the version
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except OSError:
        raise ConfigError(
            f"{name}: no such file or folder, and no repository of the Hugging Face hub that can be reached ({reason}) "
            "or is in its cache"
        ) from None
