"""The sampling commands behind the rows of a table, and which finished calibration serves each."""

import hashlib
import json
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qdiff.errors import ConfigError
from qdiff.utils.files import file_hash, write_text
from qdiff_cli.commands.txt2img import TextCommand
from qdiff_cli.quantization import DRAWN_SET, PACKED
from qdiff_cli.quantization_options import RECONSTRUCTION_OPTIONS, QuantizationOptions
from qdiff_cli.sampling_run import SamplingCommand
from qdiff_cli.tables import FULL, LINEAR, QDIFF, PaperTable, Row

MODES = {QDIFF: "qdiff", LINEAR: "linear"}
# What a calibrated checkpoint depends on, by the names in run.json, and options named alike that say where it comes
# from.
RECIPE = {
    *("preset", "weight_bit", "split", "quant_mode", "weight_scale_method", "ckpt", "config", "resume_base"),
    "overrides",
}
NOT_RECIPE = {"cali_data_path", "cali_ckpt", "cali_cache_gb"}


@dataclass(frozen=True)
class TableOptions:
    """The options of reproduce.py that decide on the commands of a table.

    Attributes:
        output: the folder of all tables.
        images: images of each row; None: as published.
        rows: the names of the rows; None: all.
        checkpoints: a folder of calibrated checkpoints.
        captions: COCO's annotation file.
    """

    output: Path
    images: int | None = None
    rows: tuple[str, ...] | None = None
    checkpoints: Path | None = None
    captions: Path | None = None


class TableCommands:
    """The sampling commands of a table's rows, in its folder.

    Args:
        table: the table. Its command has the options of `--preset` and those after `--` already.
        options: the options of reproduce.py.
        given: the names of the options after `--`. They come before those of the rows.

    Raises:
        ConfigError: an unknown row.
    """

    def __init__(self, table: PaperTable, options: TableOptions, given: frozenset[str] = frozenset()) -> None:
        self.table, self.options, self.given = table, options, given
        self.folder = options.output / table.name
        self.count = options.images or table.images
        self.rows = self._selected()
        self.captions = cache(self._captions)

    def _selected(self) -> list[Row]:
        known, names = {row.slug: row for row in self.table.rows}, self.options.rows
        if unknown := [name for name in names or () if name not in known]:
            raise ConfigError(f"--rows {' '.join(unknown)}: expected some of {', '.join(known)}")
        return [row for name, row in known.items() if names is None or name in names]

    def full_precision(self, count: int, seed: int, folder: Path) -> SamplingCommand:
        """The command in full precision for this number of images."""
        command = replace(self.table.command.to_folder(folder), seed=seed)
        if self.table.captions and isinstance(command, TextCommand):
            return replace(command, from_file=self.captions(count))
        return command.with_images(count)

    def command(self, row: Row, count: int, seed: int, folder: Path) -> SamplingCommand:
        """The command of a row: how its network is quantized, and where the result comes from."""
        command = self.full_precision(count, seed, folder)
        if row.method == FULL:
            return command
        quantization = self.quantization(row)
        if (found := self.checkpoint(row)) is not None:
            quantization = replace(quantization, cali_ckpt=found)
        elif drawn := sorted(self.folder.rglob(DRAWN_SET)):  # by another row, from the same samples
            quantization = replace(quantization, cali_data_path=str(drawn[0]))
        return replace(command, quantization=quantization)

    def given_checkpoint(self, row: Row) -> Path | None:
        """The calibrated checkpoint for a row in --checkpoints or beside the bundled model."""
        for folder in (self.options.checkpoints, self.table.checkpoints) if row.method == QDIFF else ():
            for name in (row.file, f"w{row.weight_bit}a8"):
                for suffix in (".safetensors", ".pth"):
                    if folder is not None and (folder / (name + suffix)).is_file():
                        return folder / (name + suffix)
        return None

    def checkpoint(self, row: Row) -> Path | None:
        """A calibrated checkpoint for a row: given, or of an earlier calibration here by the same recipe."""
        if (given := self.given_checkpoint(row)) is not None:
            return given
        same = [other for other in self.table.rows if (other.method, other.weight_bit) == (row.method, row.weight_bit)]
        same = [row] + [other for other in same if other.act_bit == 8 and row.method == QDIFF]
        found = [(path, other) for other in same for path in sorted((self.folder / other.slug).rglob(PACKED))]
        return next((path for path, other in found if self._calibrated_alike(path, other)), None)

    def _calibrated_alike(self, path: Path, row: Row) -> bool:
        """Whether the run around a checkpoint had the options that a calibration of `row` would have now."""
        wanted = replace(self.table.command, quantization=self.quantization(row)).settings()
        found = read_json(path.parent / "run.json")
        names = [name for name in wanted if name in RECIPE or (name.startswith("cali_") and name not in NOT_RECIPE)]
        return all(json.loads(json.dumps(wanted[name], default=str)) == found.get(name) for name in names)

    def quantization(self, row: Row) -> QuantizationOptions:
        """The options of a calibration of a row."""
        changes: dict[str, Any] = {"ptq": True, "weight_bit": row.weight_bit, "quant_mode": MODES[row.method]}
        if row.act_bit < 32:
            changes |= self.table.activations
        changes = {name: value for name, value in changes.items() if name not in self.given}
        if row.method == LINEAR:
            changes |= dict.fromkeys(RECONSTRUCTION_OPTIONS)  # they would make equal calibrations look different
        return replace(self.table.command.quantization, **changes)

    def started(self, row: Row, seed: int) -> SamplingCommand:
        """The command that samples the images of a row, the first one of this row and seed that was kept here.

        Raises:
            ConfigError: the folder holds images of other options or files.
        """
        folder = self.place(row, seed)
        kept = folder / "command.json"
        command = self.command(row, self.count, seed, folder)
        if kept.is_file():
            begun = read_json(kept)
            command = self._as_begun(command, row, begun, folder)
        else:
            content = {"settings": command.settings(), "files": hashes(command.input_files())}
            write_text(kept, json.dumps(content))
        if any(folder.rglob("run.json")):
            command = replace(command, run=replace(command.run, continue_run=True))
        return command

    def _as_begun(self, command: SamplingCommand, row: Row, begun: dict[str, Any], folder: Path) -> SamplingCommand:
        """The command with the checkpoint or calibration set that the row was begun with."""
        settings = begun.get("settings")
        if not isinstance(settings, dict):
            raise ConfigError(f"{folder}: begun by an earlier version; remove it, or take another --output")
        before = None if settings.get("cali_ckpt") is None else Path(settings["cali_ckpt"])
        given = self.given_checkpoint(row)
        if given is None or given == before:
            data = settings.get("cali_data_path")
            quantization = replace(command.quantization, cali_ckpt=before, cali_data_path=data)
            command = replace(command, quantization=quantization)
        now = json.loads(json.dumps(command.settings()))
        changed = [name for name in now if now[name] != settings.get(name) and name != "continue_run"]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{folder}: begun with other options ({name} was {settings.get(name)}, is {now[name]}); "
                "remove it, or take another --output"
            )
        found = hashes(command.input_files())
        if other := [path for path, digest in found.items() if begun["files"].get(path, digest) != digest]:
            raise ConfigError(
                f"{folder}: begun with another {other[0]} under this name; remove it, or take another --output"
            )
        return command

    def place(self, row: Row, seed: int) -> Path:
        """The folder of a row's images of a seed."""
        return self.folder / row.slug / f"seed{seed}-{self.count}"

    def _captions(self, count: int) -> Path:
        """A file of `count` captions of as many images, drawn in a fixed order, under a hash of its content."""
        file = self.options.captions
        if file is None:
            raise ConfigError("--captions: expected COCO's annotation file (captions_val2014.json)")
        try:
            entries = json.loads(file.read_text(encoding="utf-8-sig"))["annotations"]
            captions: dict[int, str] = {}
            for entry in sorted(entries, key=lambda entry: entry["id"]):
                if text := " ".join(str(entry["caption"]).split()):
                    captions.setdefault(entry["image_id"], text)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--captions {file}: not a COCO caption file ({error!r})") from None
        if len(captions) < count:
            raise ConfigError(f"--captions {file}: captions of {len(captions)} images, expected at least {count}")
        content = "\n".join(random.Random(0).sample(list(captions.values()), count)) + "\n"
        path = self.folder / f"captions-{count}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.txt"
        write_text(path, content)
        return path


def hashes(files: list[Path]) -> dict[str, str]:
    """sha256 of files, by path."""
    return {str(file): _hash(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@cache
def _hash(path: str, size: int, modified: int) -> str:
    return file_hash(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that was written here.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: damaged; remove it")
    return found
