"""The folder of a calibration that survives being killed: one file for each finished step, and a manifest.

The manifest has one JSON line for the settings and one for each finished step, in order. Each line has a checksum over
itself and the line before, so that a lost line is noticed. The manifest is replaced atomically and synced after every
step, after the step's own file. A step that is not in it has not happened. Nothing else carries over from step to
step: the random numbers of a step follow from its number and the seed, which the settings hold.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qdiff.checkpoint import read_tensors
from qdiff.errors import ConfigError
from qdiff.utils.files import atomic_write, file_hash, write_text

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
FORMAT = 2


@dataclass(frozen=True)
class CalibrationDir:
    """Where a calibration keeps its state, and the memory it may use. Nothing here changes its result.

    Attributes:
        folder: for the resume log and for activations that do not fit into memory; None: nothing is kept.
        cache_bytes: bytes of memory for activations; None: half of what is free.
    """

    folder: Path | None = None
    cache_bytes: int | None = None


@dataclass
class CalibrationCheckpoint:
    """The resume log: the finished steps of one calibration.

    Attributes:
        folder: where they are; None: they are not kept.
        settings: everything that the result depends on.
        writes: whether this process writes; the others only read.
        records: what the manifest holds of each finished step.
    """

    folder: Path | None
    settings: dict[str, Any]
    writes: bool = True
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path | None, settings: dict[str, Any], writes: bool = True) -> "CalibrationCheckpoint":
        """Start in an empty folder, or continue.

        A damaged line or file is named in the log; the steps before it are used, the others are done again.

        Raises:
            ConfigError: the folder holds a calibration with other settings (both values are named), or its settings
                cannot be read.
        """
        settings = json.loads(json.dumps({"format": FORMAT} | settings))
        checkpoint = cls(folder, settings, writes)
        if folder is None:
            return checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).is_file():
            checkpoint._read(folder)
        checkpoint._write()
        return checkpoint

    def __len__(self) -> int:
        return len(self.records)

    def load(self, number: int) -> dict[str, Tensor]:
        """The tensors of a finished step."""
        assert self.folder is not None  # without a folder no step is finished when a calibration begins
        return read_tensors(self.folder / self.records[number]["file"])

    def commit(self, name: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished step, for good once this returns."""
        entry = {"step": name} | record
        if self.folder is not None and self.writes:
            path = self.folder / f"{len(self.records):04d}.safetensors"
            with atomic_write(path) as temporary:
                save_file(_apart(tensors), temporary)
            entry |= {"file": path.name, "sha256": file_hash(path)}
        self.records.append(entry)
        self._write()

    def _write(self) -> None:
        if self.folder is None or not self.writes:
            return
        write_text(self.folder / MANIFEST, _lines([self.settings, *self.records]))

    def _read(self, folder: Path) -> None:
        path = folder / MANIFEST
        contents = list(_parse(path.read_bytes().decode("utf-8", "replace").splitlines()))
        settings = contents[0] if contents else None
        if settings is None:
            raise ConfigError(
                f"{path}: damaged: line 1 (the settings) cannot be read; remove the folder to calibrate anew"
            )
        for key in sorted({*settings, *self.settings}):
            if settings.get(key) != self.settings.get(key):
                now, then = _differing(self.settings.get(key), settings.get(key))
                raise ConfigError(f"{path}: {key} is {now} now, but was {then} when this calibration began")
        for number, entry in enumerate(contents[1:]):
            if entry is None:
                log.warning("%s: line %d is damaged: continuing after step %d", path, number + 2, number)
                return
            found: str | None
            try:
                found = file_hash(folder / entry["file"])
            except OSError as error:
                found = error.strerror
            if found != entry["sha256"]:
                log.warning("%s: damaged or missing: continuing after step %d", folder / entry["file"], number)
                return
            self.records.append(entry)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of which shares memory with another."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        own[name] = kept.clone() if kept.data_ptr() in seen else kept
        seen.add(kept.data_ptr())
    return own


def read_records(path: Path) -> list[dict[str, Any]]:
    """What the manifest at `path` records of each finished step."""
    return [entry for entry in list(_parse(path.read_text(encoding="utf-8").splitlines()))[1:] if entry is not None]


def _differing(now: Any, then: Any) -> tuple[Any, Any]:
    """Two values; of lists of the same kind, the first items that differ."""
    if isinstance(now, list) and isinstance(then, list):
        return next(((a, b) for a, b in zip_longest(now, then) if a != b), (now, then))
    return now, then


def _checksum(previous: str, text: str) -> str:
    return hashlib.sha256((previous + text).encode()).hexdigest()[:16]


def _lines(contents: list[dict[str, Any]]) -> str:
    lines, checksum = [], ""
    for content in contents:
        text = json.dumps(content, sort_keys=True)
        checksum = _checksum(checksum, text)
        lines.append(f"{checksum} {text}\n")
    return "".join(lines)


def _parse(lines: list[str]) -> Iterator[dict[str, Any] | None]:
    """The content of each line; None, and the end, at the first that is damaged or does not follow the one before."""
    previous = ""
    for line in lines:
        checksum, _, text = line.partition(" ")
        if _checksum(previous, text) != checksum:
            yield None
            return
        previous = checksum
        yield json.loads(text)
