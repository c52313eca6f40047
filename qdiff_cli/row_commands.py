"""The commands behind the rows of a table: what each is told, where it lies, and which finished calibration serves it."""

import argparse
import hashlib
import json
import random
import shlex
from functools import cache
from pathlib import Path

from qdiff.errors import ConfigError
from qdiff.utils.files import file_hash, write_text
from qdiff_cli.options import RULES, idle, split_quantization
from qdiff_cli.sampling_run import parse
from qdiff_cli.tables import FULL, LINEAR, QDIFF, PaperTable, Row

# options of the sampling scripts that the rows decide, and those that always pass
OF_ROWS = {"ptq", "quant_act", "weight_bit", "act_bit", "quant_mode", "cali_ckpt", "resume_w"}
ALWAYS = {"cond", "resume"}
QDIFF_MODE = {QDIFF: "qdiff", LINEAR: "linear"}
# what a calibrated checkpoint depends on, by the names of the sampling scripts' options; and options named like it that say where from
RECIPE = {
    "preset",
    "weight_bit",
    "split",
    "quant_mode",
    "weight_scale_method",
    "ckpt",
    "config",
    "resume_base",
    "overrides",
}
NOT_RECIPE = {"cali_data_path", "cali_ckpt", "cali_cache_gb"}


class RowCommands:
    """The sampling commands of a table's rows, in its folder.

    table: the table. folder: where everything of it lies. count: images of each row. rows: those that are asked for.
    """

    def __init__(self, table: PaperTable, args: argparse.Namespace) -> None:
        self.table, self.args = table, args
        self.folder = args.output / table.name
        self.count = args.images or table.images
        self.rows = self._selected(args.rows)
        self.more, self.quantizing = split_quantization(args.more)
        self.captions = cache(self._captions)

    def _selected(self, names: list[str] | None) -> list[Row]:
        known = {row.slug: row for row in self.table.rows}
        unknown = [name for name in names or [] if name not in known]
        if unknown:
            raise ConfigError(f"--rows {' '.join(unknown)}: expected some of {', '.join(known)}")
        return [row for name, row in known.items() if names is None or name in names]

    def options(self, count: int, seed: int, folder: Path) -> list[str]:
        table, args = self.table, self.args
        words = [*shlex.split(table.command), "--seed", str(seed), table.logdir, str(folder)]
        words += ["--device", args.device, "--threads", str(args.threads)]
        words += (
            [table.count, str(-(-count // table.images_each))]
            if table.count
            else ["--from-file", str(self.captions(count))]
        )
        return words + self.more

    def quantization(self, row: Row) -> list[str]:
        """The options of a row: how its network is quantized, and where the result comes from."""
        if row.method == FULL:
            return []
        if (found := self.checkpoint(row)) is not None:
            return self.acting([*self.method(row), *self.recipe(), "--cali_ckpt", str(found)])
        drawn = sorted(self.folder.rglob("calibration_set.pt"))  # by another row, of the same rows
        return self.acting([*self.method(row), *(["--cali_data_path", str(drawn[0])] if drawn else []), *self.recipe()])

    def acting(self, words: list[str]) -> list[str]:
        """Quantization options without those that do nothing beside the others: a recipe beside a finished file, say."""
        _, found = split_quantization(words)
        args = parse([*self.options(self.count, 0, self.folder), *words])[1]
        silent = {name for name, _ in idle(args, RULES)}
        return [word for name, option in found.items() if name not in silent for word in option]

    def given_checkpoint(self, row: Row) -> Path | None:
        """The calibrated checkpoint for a row in --checkpoints or beside the bundled model."""
        for folder in (self.args.checkpoints, self.table.checkpoints) if row.method == QDIFF else ():
            for name in (row.file, f"w{row.weight_bit}a8"):
                for suffix in (".safetensors", ".pth"):
                    if folder is not None and (folder / (name + suffix)).is_file():
                        return folder / (name + suffix)
        return None

    def checkpoint(self, row: Row) -> Path | None:
        """A calibrated checkpoint for a row: given, or of an earlier calibration here, of the same weights by the same recipe."""
        if (given := self.given_checkpoint(row)) is not None:
            return given
        same = [other for other in self.table.rows if (other.method, other.weight_bit) == (row.method, row.weight_bit)]
        same = [row] + [other for other in same if other.act_bit == 8 and row.method == QDIFF]
        found = [
            (path, other) for other in same for path in sorted((self.folder / other.slug).rglob("ckpt.safetensors"))
        ]
        return next((path for path, other in found if self._made_alike(path, other)), None)

    def _made_alike(self, path: Path, row: Row) -> bool:
        """Whether the run around a checkpoint was told what a calibration of `row` would be told now."""
        wanted = vars(self.calibration(row))
        made = read_json(path.parent / "run.json")
        told = [name for name in wanted if name in RECIPE or (name.startswith("cali_") and name not in NOT_RECIPE)]
        return all(json.loads(json.dumps(wanted[name], default=str)) == made.get(name) for name in told)

    def method(self, row: Row) -> list[str]:
        """The options that say how a row is quantized."""
        words = [
            "--ptq",
            "--weight_bit",
            str(row.weight_bit),
            *shlex.split(self.table.weights),
            "--quant_mode",
            QDIFF_MODE[row.method],
        ]
        return words + (shlex.split(self.table.acts) if row.act_bit < 32 else [])

    def recipe(self) -> list[str]:
        """The options of a calibration, those after `--` last."""
        words = [*shlex.split(self.table.calibration), *(["--preset", self.args.preset] if self.args.preset else [])]
        return words + [word for option in self.quantizing.values() for word in option]

    def calibration(self, row: Row) -> argparse.Namespace:
        """All options of a command that calibrates a row."""
        words = self.acting([*self.method(row), *self.recipe()])
        return parse([*self.options(self.count, 0, self.folder), *words])[1]

    def check_options(self) -> None:
        """Raise ConfigError for options that belong to the rows, or that no row of this table would heed."""
        if taken := sorted(OF_ROWS & set(self.quantizing)):
            raise ConfigError(
                f"--{taken[0]}: belongs to the rows of the table; choose them by --rows, and files by --checkpoints"
            )
        wanted = {**self.quantizing, **({"preset": []} if self.args.preset else {})}
        rows = [row for row in self.rows if row.method != FULL]
        heeded: set[str] = set()
        for row in rows:
            given = self.given_checkpoint(row)
            words = [*self.method(row), *self.recipe(), *(["--cali_ckpt", str(given)] if given else [])]
            heeded |= set(split_quantization(self.acting(words))[1])
        if silent := [name for name in wanted if name not in heeded | ALWAYS]:
            raise ConfigError(
                f"--{silent[0]}: no row of the table {self.table.name} heeds it ({len(rows)} quantized rows)"
            )

    def _captions(self, count: int) -> Path:
        """A file of `count` captions of as many images, drawn from the annotation file in a fixed order, under a hash of its content."""
        if self.args.captions is None:
            raise ConfigError("--captions: expected COCO's annotation file (captions_val2014.json)")
        try:
            entries = json.loads(self.args.captions.read_text(encoding="utf-8-sig"))["annotations"]
            words: dict[int, str] = {}
            for entry in sorted(entries, key=lambda entry: entry["id"]):
                if text := " ".join(str(entry["caption"]).split()):
                    words.setdefault(entry["image_id"], text)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--captions {self.args.captions}: not a COCO caption file ({error!r})") from None
        if len(words) < count:
            raise ConfigError(
                f"--captions {self.args.captions}: captions of {len(words)} images, expected at least {count}"
            )
        content = "\n".join(random.Random(0).sample(list(words.values()), count)) + "\n"
        path = self.folder / f"captions-{count}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.txt"
        write_text(path, content)
        return path

    def command(self, row: Row, seed: int, count: int) -> list[str]:
        """The command that makes the images of a row: the first one, kept and used again; ConfigError where it would be another now."""
        folder = self.place(row, seed, count)
        kept, options = folder / "command.json", self.options(count, seed, folder)
        if not kept.is_file():
            words = options + self.quantization(row)
            write_text(kept, json.dumps({"words": words, "files": hashes(words)}))
        begun = read_json(kept)
        words = begun["words"]
        if ((given := self.given_checkpoint(row)) and str(given) not in words) or words[: len(options)] != options:
            raise ConfigError(
                f"{folder}: begun with other options ({shlex.join(words)}); remove it, or take another --output"
            )
        if changed := [name for name, found in hashes(words).items() if begun["files"].get(name, found) != found]:
            raise ConfigError(
                f"{folder}: begun with another {changed[0]} under this name; remove it, or take another --output"
            )
        return words + (["--continue"] if any(folder.rglob("run.json")) else [])

    def place(self, row: Row, seed: int, count: int) -> Path:
        return self.folder / row.slug / f"seed{seed}-{count}"


def hashes(words: list[str]) -> dict[str, str]:
    """sha256 of the files among the words of a command."""
    return {
        word: _hash(word, Path(word).stat().st_size, Path(word).stat().st_mtime_ns)
        for word in words
        if Path(word).is_file()
    }


@cache
def _hash(path: str, size: int, modified: int) -> str:
    return file_hash(path)


def read_json(path: Path) -> dict:
    """A file that was written here; ConfigError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: damaged; remove it")
    return found
