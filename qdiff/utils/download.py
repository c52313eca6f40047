"""Downloads: continued where they broke off, checked before they are used."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.files import file_hash


def cache_root() -> Path:
    """`$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def fetch(url: str, path: Path, digest: str, algorithm: str = "md5") -> Path:
    """`path`, downloaded from `url` if it is not there, continuing an earlier attempt; its digest (or the start of it) is checked.

    Raises:
        ConfigError: no connection, or the content is not what was expected.
    """
    if path.is_file():
        _check(path, digest, algorithm, path)
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):  # several processes may want it
            if not path.is_file():
                _download(url, partial)
                _check(partial, digest, algorithm, url)
                partial.replace(path)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"no weights at {path}, and {url} cannot be reached ({reason}); put the file there or give another by its option"
        ) from None
    return path


def _download(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.build_opener().open(
            request, timeout=30
        )  # the proxies of now, not of the process's first request
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing left to fetch: the whole file is there
            return
        raise
    with response:
        resumed = response.status == 206
        length = int(response.headers.get("Content-Length") or 0)
        done = start if resumed else 0
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=done + length or None, initial=done, unit="B", unit_scale=True, desc=partial.stem) as progress,
        ):
            while block := response.read(1 << 20):
                file.write(block)
                progress.update(len(block))
        if length and partial.stat().st_size < done + length:
            raise OSError(
                f"the connection broke after {partial.stat().st_size} of {done + length} bytes; the same command continues"
            )


def _check(path: Path, expected: str, algorithm: str, source: Path | str) -> None:
    found = file_hash(path, algorithm)
    if not found.startswith(expected):
        if path.suffix == ".partial":
            path.unlink()
        raise CheckpointError(
            f"{source}: {algorithm} {found}, expected {expected}: damaged or another file; remove it and try again"
        )
