"""Folders of the library diffusers: their layout, settings and weights. Nothing in them is imported or executed.

There are two layouts. A saved pipeline has `model_index.json` and a folder for each part (`unet/`, `vae/`, ...). The
repositories google/ddpm-* hold the files of the UNet and of the scheduler at the top.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from qdiff.checkpoint.reading import read_tensors
from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.settings import typed

log = logging.getLogger(__name__)
Config = TypeVar("Config")

INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"
IGNORED_PARTS = ("safety_checker", "feature_extractor")
PARTS = ("", "unet", "vae", "vqvae", "text_encoder", "tokenizer", "scheduler")  # folders with files that are read
WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(\.(?P<variant>\w+))?\.(?P<format>safetensors|bin)(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)
HALF_VARIANTS = ("fp16", "bf16")


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, or the index of a sharded one.

    Attributes:
        name: its name.
        variant: the variant in its name, such as `fp16`; empty: full precision.
        format: `safetensors` or `bin`.
        is_index: whether it is an index, which names the shards.
    """

    name: str
    variant: str
    format: str
    is_index: bool

    @property
    def rank(self) -> tuple[int, bool]:
        """The order of preference: full precision, then half precision, then others; safetensors before pickles."""
        precision = 0 if not self.variant else 1 if self.variant in HALF_VARIANTS else 2
        return precision, self.format == "bin"

    def owns(self, name: str) -> bool:
        """Whether a file is this one or a shard of it."""
        if name == self.name or not self.is_index:
            return name == self.name
        stem, variant = self.name.partition(".")[0], rf"(\.{self.variant})?" if self.variant else ""
        shard = rf"{stem}{variant}-\d+-of-\d+{variant}\.{self.format}"
        return re.fullmatch(shard, name) is not None and self.variant in name


def weight_files(names: Iterable[str]) -> list[WeightFile]:
    """Find the files of weights among the names of the files of a folder, the preferred one first."""
    found = []
    for name in sorted(names):
        if match := WEIGHTS.fullmatch(name):
            variant = match["variant"] or match["index_variant"] or ""
            found.append(WeightFile(name, variant, match["format"], match["index"] is not None))
    return sorted(found, key=lambda file: file.rank)


def needed_files(names: Iterable[str]) -> list[str]:
    """Select the files of a repository that are read: settings, tokenizer, and one file of weights for each part."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    needed = []
    for folder in PARTS:
        files = folders.get(folder, [])
        weights = weight_files(files)[:1]
        kept = [
            file
            for file in files
            if any(chosen.owns(file) for chosen in weights)
            or (file.endswith((".json", ".txt")) and not WEIGHTS.fullmatch(file))
        ]
        needed += [f"{folder}/{file}" if folder else file for file in kept]
    return needed


@contextmanager
def errors_name(file: Path) -> Iterator[None]:
    """Put the file that a ConfigError is about before its message, in a `with` statement."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


class Settings:
    """The settings of a JSON file. Each must be read, expected or named as harmless; `finish` refuses the others.

    Args:
        file: the file, for messages.
        values: its content.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values
        self._known: set[str] = set()

    def get(self, name: str, kind: Any, default: Any) -> Any:
        """Return a setting.

        Args:
            name: its name.
            kind: its type, as `qdiff.utils.settings.typed` takes it.
            default: the value that diffusers takes if the setting is missing.

        Raises:
            ConfigError: a value of another type.
        """
        self._known.add(name)
        with errors_name(self.file):
            return typed(self.values.get(name, default), kind, name)

    def square_size(self, name: str) -> int:
        """Return the width and height of a square: a number, or a pair of equal numbers. ConfigError for others."""
        self._known.add(name)
        size = self.values.get(name)
        if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
            size = size[0]
        if not isinstance(size, int) or isinstance(size, bool):
            self.refuse(name, ": expected the width of square images", size)
        return int(size)

    def expect(self, expected: Mapping[str, tuple[Any, Any]]) -> None:
        """Check settings of which one value is supported.

        Args:
            expected: from the name of a setting to the value that diffusers takes if it is missing, and the expected
                value.

        Raises:
            ConfigError: another value. The message has both.
        """
        for name, (default, value) in expected.items():
            self._known.add(name)
            found = self.values.get(name, default)
            if found != value or isinstance(found, bool) != isinstance(value, bool):
                missing = "" if name in self.values else " (the default of diffusers, because it is missing)"
                self.refuse(name, f"{missing}: expected {_shown(value)}", found)

    def refuse(self, name: str, message: str, found: Any) -> NoReturn:
        """Raise a ConfigError about a setting with the value `found`."""
        raise ConfigError(f"{self.file}: {name} {_shown(found)}{message}")

    def finish(self, harmless: Collection[str]) -> None:
        """Check that no other setting can change the function.

        Args:
            harmless: the names of settings that do not change it.

        Raises:
            ConfigError: an unknown setting that is neither null nor false.
        """
        for name, value in self.values.items():
            is_off = value is None or value is False
            if not (name in self._known or name in harmless or name.startswith("_") or is_off):
                self.refuse(name, ": a setting that is not known here, so it may change the function", value)


def _shown(value: Any) -> str:
    """A value as JSON has it."""
    return json.dumps(value, default=str)


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: a network or the scheduler.

    Attributes:
        file: the JSON file of its settings; the weights lie beside it.
        values: its settings.
    """

    file: Path
    values: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        """The name of its class: that of diffusers, or of transformers."""
        architectures = self.values.get("architectures")
        name = architectures[0] if isinstance(architectures, list) and architectures else self.values.get("_class_name")
        return str(name)

    def settings(self, *classes: str) -> Settings:
        """Return the settings of a part that has one of these classes.

        Raises:
            ConfigError: it has another class, or its weights are quantized.
        """
        if self.class_name not in classes:
            raise ConfigError(f"{self.file}: class {self.class_name}: expected {' or '.join(classes)}")
        if isinstance(quantization := self.values.get("quantization_config"), Mapping):
            found = quantization.get("quant_method")
            raise ConfigError(f"{self.file}: weights quantized by {found}: expected full precision")
        return Settings(self.file, self.values)

    def tensors(self) -> dict[str, Tensor]:
        """Read the weights, memory-mapped. If several files lie together, the log says which one was taken.

        Raises:
            CheckpointError: there are none, a shard is missing, or a file is damaged.
        """
        folder = self.file.parent
        files = weight_files(path.name for path in folder.iterdir())
        if not files:
            raise CheckpointError(
                f"{folder}: no weights: expected diffusion_pytorch_model.safetensors or model.safetensors, a .bin "
                "file, or the index of shards"
            )
        chosen, *others = files
        if others or chosen.variant:
            beside = ", ".join(file.name for file in others) or "no other file of weights"
            log.warning("%s: the weights are those of %s (beside it: %s)", folder, chosen.name, beside)
        state: dict[str, Tensor] = {}
        for file in _shards(folder / chosen.name) if chosen.is_index else [folder / chosen.name]:
            state |= read_tensors(file)
        return state


def _shards(index: Path) -> list[Path]:
    """Return the shards that an index names. CheckpointError if one is missing or lies elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map with the shard of each tensor")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names the shard {name!r}: expected a file beside the index")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names the shard {name}, which is missing")
    return [index.parent / name for name in names]


class DiffusersFolder:
    """A folder of diffusers; `find` recognizes one.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, path: str | Path | None) -> "DiffusersFolder | None":
        """Return the folder of diffusers at `path`, or None if there is none."""
        if path is None:
            return None
        path = Path(path)
        top = path / CONFIG  # other programs write such a file too
        is_network = top.is_file() and "_class_name" in top.read_text(encoding="utf-8", errors="replace")
        is_pipeline = (path / INDEX).is_file() or (path / "unet" / CONFIG).is_file()
        return cls(path) if is_network or is_pipeline else None

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`; empty if there is no such file."""
        return read_json(self.path / INDEX) if (self.path / INDEX).is_file() else {}

    def files(self) -> list[Path]:
        """The files that are read: settings, tokenizer, and one file of weights for each part."""
        names = [
            f"{name}/{file.name}" if name else file.name for name in PARTS for file in (self.path / name).glob("*")
        ]
        return [self.path / name for name in sorted(needed_files(names)) if (self.path / name).is_file()]

    def has(self, name: str) -> bool:
        """Whether the folder has a folder of this name with settings."""
        return (self.path / name / CONFIG).is_file()

    @property
    def is_latent(self) -> bool:
        """Whether the UNet works on latents: the folder has an autoencoder, or a UNet with a context."""
        return self.has("vae") or self.has("vqvae") or self.part("unet").class_name == "UNet2DConditionModel"

    def require_pipeline(self, pipelines: Collection[str], parts: Mapping[str, Collection[str]]) -> None:
        """Check the classes of the pipeline and of its parts. Only names are compared: no class is imported.

        Args:
            pipelines: the names of the supported pipelines.
            parts: the names of the supported classes of each part, with their library: `diffusers.UNet2DModel`.

        Raises:
            ConfigError: another pipeline, or a part of another class.
        """
        file, found = self.path / INDEX, self.index.get("_class_name")
        if self.index and found not in pipelines:
            raise ConfigError(f"{file}: a {found}: expected {' or '.join(pipelines)}")
        for name, value in self.index.items():
            is_part = isinstance(value, list) and any(word is not None for word in value)
            if name.startswith("_") or not is_part:
                continue
            if name in IGNORED_PARTS:
                log.info("%s: %s is ignored", file, name)
                continue
            kind = ".".join(map(str, value))
            if name not in parts:
                known = f"{', '.join(parts)} (and {', '.join(IGNORED_PARTS)}, which are ignored)"
                raise ConfigError(f"{file}: {name} of class {kind}: expected no other parts than {known}")
            if kind not in parts[name]:
                raise ConfigError(f"{file}: {name} of class {kind}: expected {' or '.join(parts[name])}")

    def part(self, name: str) -> Part:
        """Read the settings of a network, which lie in a folder of its name; those of the UNet may lie at the top.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        file = self.path / name / CONFIG
        if name == "unet" and not file.is_file() and (self.path / CONFIG).is_file():
            file = self.path / CONFIG
        return Part(file, read_json(file))

    def scheduler(self) -> Part:
        """Read the settings of the scheduler. CheckpointError if they are missing or damaged."""
        file = self.path / "scheduler" / SCHEDULER_CONFIG
        file = file if file.is_file() else self.path / SCHEDULER_CONFIG
        return Part(file, read_json(file))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file: expected a complete folder of diffusers")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a JSON file that can be read ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def resolve_config(
    config: Path | None,
    checkpoint: Path | None,
    read_yaml: Callable[[Path], Config],
    read_folder: Callable[[DiffusersFolder], Config],
    agreed: Callable[[Config, Config, DiffusersFolder], Config],
) -> Config:
    """Return the configuration of a model.

    Args:
        config: a YAML file; None: the checkpoint is a folder of diffusers, which holds the configuration.
        checkpoint: the full-precision checkpoint. If it is a folder of diffusers, a given YAML file must agree with it.
        read_yaml: reads a YAML file.
        read_folder: reads the configuration in a folder of diffusers.
        agreed: compares the configurations of the YAML file and of the folder, and returns the one to take.

    Raises:
        CheckpointError: a file of the folder is missing or damaged.
        ConfigError: there is no configuration, it cannot be used, or the YAML file does not agree with the folder.
    """
    folder = DiffusersFolder.find(checkpoint)
    if folder is None:
        if config is None:
            raise ConfigError(": expected a YAML file; only a folder of diffusers does not need it", field="config")
        return read_yaml(config)
    found = read_folder(folder)
    return found if config is None else agreed(read_yaml(config), found, folder)


def require_agreement(given: Mapping[str, Any], found: Mapping[str, Any], config: Path, folder: Path) -> None:
    """Compare a given YAML file with a folder of diffusers.

    Args:
        given: the settings of the YAML file, by name.
        found: the same settings as the folder has them.
        config: the YAML file, for messages.
        folder: the folder, for messages.

    Raises:
        ConfigError: they differ. The message has the first such setting with both values.
    """
    for name in found:
        if given.get(name) != found[name]:
            message = f" {config}: {name} {_shown(given.get(name))}, but {folder} has {_shown(found[name])}"
            raise ConfigError(message, field="config")
