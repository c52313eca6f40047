"""Atomic writing, hashes, and recognition of files that only look like checkpoints."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qdiff.errors import WriteError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success, sync the file to disk and rename it to `path`.

    A crash leaves the old file or the new one, never a part of it.

    Args:
        path: the file to write; its folder is made if it does not exist.

    Raises:
        WriteError: the file cannot be written, for lack of permission or space.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _TORCH_WRITE_ERRORS):
            raise
        if isinstance(error, OSError) and error.filename not in (None, *map(str, (path, temporary))):
            raise  # the error is about another file, which was read
        raise _cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# how torch.save says that a disk is full
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "unexpected pos", "file write failed")


def _temporary(path: Path) -> Path:
    """Make an empty temporary file in the folder of `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from None
    os.close(handle)
    return Path(name)


def _cannot_write(path: Path, error: Exception) -> WriteError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return error if isinstance(error, WriteError) else WriteError(f"{path}: cannot be written ({reason})")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically. Bytes of file names that are not valid text become escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(path: str | Path) -> None:
    """Check, before long work, that its result can be written.

    Args:
        path: the file that the work is going to write.

    Raises:
        WriteError: it cannot be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise WriteError(f"{path}: expected a file, found a folder")
    with contextlib.suppress(FileNotFoundError):
        _temporary(path).unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: str | Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file's content, by an algorithm that `hashlib` knows."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def describe_foreign_file(path: str | Path) -> str | None:
    """Recognize files that are often saved under a checkpoint's name by mistake.

    Returns:
        What the file is: empty, a git-LFS pointer or an HTML page; None: none of these.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(256)
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if text.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer (run `git lfs pull` to fetch the file itself)"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "an HTML page (the download was refused or redirected)"
    return None
