"""A calibration that survives being killed: a folder with one file for each finished step and a manifest.

The manifest has one JSON line for the settings and one for each finished step, in order, each with a
checksum. It is replaced atomically and synced after every step, after the step's own file. A step that is
not in it has not happened. Nothing else carries over from step to step: the random numbers of a step
follow from the seed and its number alone, which the settings hold.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qdiff.checkpoint import file_hash, read_tensors
from qdiff.config import ConfigError
from qdiff.files import atomic_write

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
FORMAT = 1


@dataclass
class Journal:
    """The finished steps of one calibration. `folder` None: they are not kept; not `writes`: only read."""

    folder: Path | None
    settings: dict[str, Any]
    writes: bool = True
    entries: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path | None, settings: dict[str, Any], writes: bool = True) -> "Journal":
        """Start in an empty folder, or continue.

        A damaged line or file is named in the log; the steps before it are used, the others done again.

        Raises:
            ConfigError: the folder holds a calibration with other settings (both values are named), or its
                settings cannot be read.
        """
        settings = json.loads(json.dumps({"format": FORMAT} | settings))
        journal = cls(folder, settings, writes)
        if folder is None:
            return journal
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).is_file():
            journal._read()
        journal._write()
        return journal

    def __len__(self) -> int:
        return len(self.entries)

    def load(self, number: int) -> dict[str, Tensor]:
        """The tensors of a finished step."""
        return read_tensors(self.folder / self.entries[number]["file"])

    def commit(self, name: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished step, for good once this returns."""
        entry = {"step": name} | record
        if self.folder is not None and self.writes:
            path = self.folder / f"{len(self.entries):04d}.safetensors"
            with atomic_write(path) as temporary:
                save_file(_apart(tensors), temporary)
            entry |= {"file": path.name, "sha256": file_hash(path)}
        self.entries.append(entry)
        self._write()

    def _write(self) -> None:
        if self.folder is None or not self.writes:
            return
        with atomic_write(self.folder / MANIFEST) as temporary:
            temporary.write_text("".join(_line(content) for content in [self.settings, *self.entries]))

    def _read(self) -> None:
        path = self.folder / MANIFEST
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
        settings = _parse(lines[0]) if lines else None
        if settings is None:
            raise ConfigError(f"{path}: damaged: line 1 (the settings) cannot be read; remove the folder to calibrate anew")
        for key in sorted({*settings, *self.settings}):
            if settings.get(key) != self.settings.get(key):
                raise ConfigError(f"{path}: {key} is {self.settings.get(key)} now, but was {settings.get(key)} when this calibration began")
        for number, text in enumerate(lines[1:]):
            entry = _parse(text)
            if entry is None:
                log.warning("%s: line %d is damaged: continuing after step %d", path, number + 2, number)
                return
            try:
                found = file_hash(self.folder / entry["file"])
            except OSError as error:
                found = error.strerror
            if found != entry["sha256"]:
                log.warning("%s: damaged or missing: continuing after step %d", self.folder / entry["file"], number)
                return
            self.entries.append(entry)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of which shares memory with another."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        own[name] = kept.clone() if kept.data_ptr() in seen else kept
        seen.add(kept.data_ptr())
    return own


def read_entries(path: Path) -> list[dict[str, Any]]:
    """What the manifest at `path` records of each finished step."""
    return [entry for entry in map(_parse, path.read_text().splitlines()[1:]) if entry is not None]


def _line(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n"


def _parse(line: str) -> dict[str, Any] | None:
    checksum, _, text = line.partition(" ")
    if hashlib.sha256(text.encode()).hexdigest()[:16] != checksum:
        return None
    return json.loads(text)
