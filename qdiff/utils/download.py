"""Downloads that continue after an interruption and are checked before use."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.files import file_hash


def cache_root() -> Path:
    """The folder of the user's caches: `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def fetch(url: str, path: Path, digest: str, algorithm: str = "md5") -> Path:
    """Download a file unless it exists, continue an interrupted download, and check the content.

    Args:
        url: where the file is.
        path: where it is stored.
        digest: the expected hexadecimal digest, or the beginning of it.
        algorithm: a name that `hashlib` knows.

    Returns:
        `path`.

    Raises:
        ConfigError: the file cannot be fetched.
        CheckpointError: its content has another digest.
    """
    if path.is_file():
        _check(path, digest, algorithm, path)
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):  # several processes may download the same file
            if not path.is_file():
                _download(url, partial)
                _check(partial, digest, algorithm, url)
                partial.replace(path)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"no weights at {path}, and {url} cannot be reached ({reason}); put the file there or name another file"
        ) from None
    return path


def _download(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks of the file at `url`."""
    start = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        # a new opener reads the proxy settings again; `urlopen` would use those of the process's first request
        response = urllib.request.build_opener().open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # the partial file is already complete
            return
        raise
    with response:
        resumed = response.status == 206
        length = int(response.headers.get("Content-Length") or 0)  # of the rest; 0 if the server does not say
        done = start if resumed else 0
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=done + length or None, initial=done, unit="B", unit_scale=True, desc=partial.stem) as progress,
        ):
            while block := response.read(1 << 20):
                file.write(block)
                progress.update(len(block))
        if length and (size := partial.stat().st_size) < done + length:
            raise OSError(f"the connection broke after {size} of {done + length} bytes; the next attempt continues")


def _check(path: Path, expected: str, algorithm: str, source: Path | str) -> None:
    """Raise CheckpointError if the digest is another one; a partial file is then deleted."""
    found = file_hash(path, algorithm)
    if not found.startswith(expected):
        if path.suffix == ".partial":
            path.unlink()
        raise CheckpointError(
            f"{source}: {algorithm} {found}, expected {expected}: damaged or another file; remove it and try again"
        )
