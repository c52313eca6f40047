"""The sampling commands for the rows of a table, and the finished calibration that each row can use."""

import hashlib
import json
import random
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from qdiff.errors import ConfigError
from qdiff.utils.files import file_hash, write_text
from qdiff_cli.commands.txt2img import TextCommand
from qdiff_cli.quantization import GENERATED_SET, PACKED
from qdiff_cli.quantization_options import RECONSTRUCTION_OPTIONS, QuantizationOptions
from qdiff_cli.sampling_run import SamplingCommand
from qdiff_cli.tables import FULL, LINEAR, QDIFF, PaperTable, Row

MODES = {QDIFF: "qdiff", LINEAR: "linear"}
# Quantization options that do not change a calibrated checkpoint.
NOT_RECIPE = {"cali_ckpt", "cali_data_path", "cali_cache_gb", "cond", "resume", "resume_w"}
# The settings in run.json that a calibrated checkpoint depends on.
RECIPE = {
    *({field.name for field in fields(QuantizationOptions)} - NOT_RECIPE),
    *("ckpt", "config", "resume_base", "overrides"),
}


@dataclass(frozen=True)
class TableOptions:
    """The options of reproduce.py that the commands of a table depend on.

    Attributes:
        output: the folder of all tables.
        images: the number of images of each row; None: the published number.
        rows: the names of the rows; None: all.
        checkpoints: a folder of calibrated checkpoints; None: there is none.
        captions: the annotation file of COCO; None: there is none.
    """

    output: Path
    images: int | None = None
    rows: tuple[str, ...] | None = None
    checkpoints: Path | None = None
    captions: Path | None = None


class TableCommands:
    """The sampling commands for the rows of a table.

    Args:
        table: the table. Its command already has the value of `--preset` and the options after `--`.
        options: the options of reproduce.py.
        given: the names of the options after `--`. They override the options of the rows.

    Raises:
        ConfigError: a row does not exist.
    """

    def __init__(self, table: PaperTable, options: TableOptions, given: frozenset[str] = frozenset()) -> None:
        self.table, self.options, self.given = table, options, given
        self.folder = options.output / table.name
        self.count = options.images or table.images
        self.rows = self._selected()
        self.captions = cache(self._captions)

    def _selected(self) -> list[Row]:
        """The rows that `options` names."""
        known, names = {row.slug: row for row in self.table.rows}, self.options.rows
        if unknown := [name for name in names or () if name not in known]:
            raise ConfigError(f"--rows {' '.join(unknown)}: expected some of {', '.join(known)}")
        return [row for name, row in known.items() if names is None or name in names]

    def full_precision(self, count: int, seed: int, folder: Path) -> SamplingCommand:
        """The command in full precision.

        Args:
            count: the number of images.
            seed: seed of the noise.
            folder: the output folder.
        """
        command = replace(self.table.command.to_folder(folder), seed=seed)
        if self.table.captions and isinstance(command, TextCommand):
            return replace(command, from_file=self.captions(count))
        return command.with_images(count)

    def command(self, row: Row, count: int, seed: int, folder: Path) -> SamplingCommand:
        """The command of a row, with the checkpoint or the calibration set that it can use.

        Args:
            row: the row.
            count: the number of images.
            seed: seed of the noise.
            folder: the output folder.
        """
        command = self.full_precision(count, seed, folder)
        if row.method == FULL:
            return command
        quantization = self.quantization(row)
        if (checkpoint := self.checkpoint(row)) is not None:
            quantization = replace(quantization, cali_ckpt=checkpoint)
        elif quantization.cali_data_path is None and (generated := sorted(self.folder.rglob(GENERATED_SET))):
            quantization = replace(
                quantization, cali_data_path=str(generated[0])
            )  # of another row, with the same samples
        return replace(command, quantization=quantization)

    def given_checkpoint(self, row: Row) -> Path | None:
        """The calibrated checkpoint for a row in --checkpoints or beside the bundled model, if any."""
        for folder in (self.options.checkpoints, self.table.checkpoints) if row.method == QDIFF else ():
            for name in (row.file, f"w{row.weight_bit}a8"):
                for suffix in (".safetensors", ".pth"):
                    if folder is not None and (folder / (name + suffix)).is_file():
                        return folder / (name + suffix)
        return None

    def checkpoint(self, row: Row) -> Path | None:
        """A calibrated checkpoint for a row: a given one, or one from an earlier calibration with the same recipe."""
        if (given := self.given_checkpoint(row)) is not None:
            return given
        same = [other for other in self.table.rows if (other.method, other.weight_bit) == (row.method, row.weight_bit)]
        same = [row] + [other for other in same if other.act_bit == 8 and row.method == QDIFF]
        candidates = [(path, other) for other in same for path in sorted((self.folder / other.slug).rglob(PACKED))]
        return next((path for path, other in candidates if self._has_same_recipe(path, other)), None)

    def _has_same_recipe(self, path: Path, row: Row) -> bool:
        """Whether the run of a checkpoint had the same recipe as a calibration of `row` would have now."""
        now = replace(self.table.command, quantization=self.quantization(row)).settings()
        before = read_json(path.parent / "run.json")
        names = [name for name in now if name in RECIPE]
        return all(json.loads(json.dumps(now[name], default=str)) == before.get(name) for name in names)

    def quantization(self, row: Row) -> QuantizationOptions:
        """The quantization options for a calibration of a row."""
        changes: dict[str, Any] = {"ptq": True, "weight_bit": row.weight_bit, "quant_mode": MODES[row.method]}
        if row.act_bit < 32:
            changes |= self.table.activations
        changes = {name: value for name, value in changes.items() if name not in self.given}
        if row.method == LINEAR:
            changes |= dict.fromkeys(RECONSTRUCTION_OPTIONS)  # without effect, but they would end up in run.json
        return replace(self.table.command.quantization, **changes)

    def started(self, row: Row, seed: int) -> SamplingCommand:
        """The command that samples the images of a row, or that continues it with the settings it was started with.

        Raises:
            ConfigError: the folder of the images was started with other options or files.
        """
        folder = self.image_folder(row, seed)
        record = folder / "command.json"
        command = self.command(row, self.count, seed, folder)
        if record.is_file():
            command = self._with_recorded_inputs(command, row, read_json(record), folder)
        else:
            content = {"settings": command.settings(), "files": hashes(command.input_files())}
            write_text(record, json.dumps(content))
        if any(folder.rglob("run.json")):
            command = replace(command, run=replace(command.run, continue_run=True))
        return command

    def _with_recorded_inputs(
        self, command: SamplingCommand, row: Row, record: dict[str, Any], folder: Path
    ) -> SamplingCommand:
        """The command with the checkpoint or the calibration set that the row was started with.

        Args:
            command: the command of the row.
            row: the row.
            record: the content of its `command.json`.
            folder: the folder of its images.

        Raises:
            ConfigError: other options, or files of the same name, were recorded.
        """
        settings = record.get("settings")
        if not isinstance(settings, dict):
            raise ConfigError(f"{folder}: begun by an earlier version; remove it, or take another --output")
        before = None if settings.get("cali_ckpt") is None else Path(settings["cali_ckpt"])
        given = self.given_checkpoint(row)
        if given is None or given == before:
            quantization = replace(command.quantization, cali_ckpt=before)
            if "cali_data_path" not in self.given:
                quantization = replace(quantization, cali_data_path=settings.get("cali_data_path"))
            command = replace(command, quantization=quantization)
        now = json.loads(json.dumps(command.settings()))
        changed = [name for name in now if now[name] != settings.get(name) and name != "continue_run"]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{folder}: begun with other options ({name} was {settings.get(name)}, is {now[name]}); "
                "remove it, or take another --output"
            )
        digests = hashes(command.input_files())
        if replaced := [path for path, digest in digests.items() if record["files"].get(path, digest) != digest]:
            raise ConfigError(
                f"{folder}: begun with another {replaced[0]} under this name; remove it, or take another --output"
            )
        return command

    def image_folder(self, row: Row, seed: int) -> Path:
        """The folder of the images of a row that are sampled with a seed."""
        return self.folder / row.slug / f"seed{seed}-{self.count}"

    def _captions(self, count: int) -> Path:
        """Write a file of captions of `count` different images, chosen in a fixed order. Its name has a hash of it."""
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
    """The sha256 of files, by path."""
    return {str(file): _hash(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@cache
def _hash(path: str, size: int, modified: int) -> str:
    """The sha256 of a file. The cache depends on its size and time of modification, to notice a changed file."""
    return file_hash(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that this program has written.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: damaged; remove it")
    return content
