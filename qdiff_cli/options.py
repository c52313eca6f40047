"""The command line: one parser for all scripts, typed groups of options, bad input as one line on stderr."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from qdiff.checkpoint.reading import first_line
from qdiff.engines.select import ENGINES
from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.devices import select_device
from qdiff.utils.memory import is_out_of_memory
from qdiff.utils.resources import find

log = logging.getLogger(__name__)
C = TypeVar("C")

# The option that sets each field of the library's configurations, for messages.
SAME_NAME = (
    *(
        "a_sym",
        "act_bit",
        "batch_tune",
        "captions",
        "ckpt",
        "classes",
        "config",
        "device",
        "engine",
        "eta",
        "quant_act",
    ),
    *("quant_mode", "sample_type", "skip_type", "sm_abit", "split", "timestep_groups", "use_pretrained", "weight_bit"),
    *("weight_scale_method",),
)
OPTION_OF_FIELD = {name: f"--{name}" for name in SAME_NAME} | {
    "batch_size": "--cali_batch_size",
    "iters": "--cali_iters",
    "iters_a": "--cali_iters_a",
    "iters_tune": "--cali_iters_tune",
    "lr": "--cali_lr_w",
    "lr_a": "--cali_lr",
    "num_timesteps": "--cali_st",
    "p": "--cali_p",
    "samples": "--cali_n",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to a help text that does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _never(args: "ParsedArgs", value: object) -> bool:
    return False


@dataclass(frozen=True)
class Rule:
    """When options act. An option that was typed and does not act is refused.

    Attributes:
        options: their names, separated by spaces.
        acts: from all options to whether these act.
        when: that in words.
        harmless: whether a value of these options asks for what happens anyway.
    """

    options: str
    acts: Callable[["ParsedArgs"], bool]
    when: str
    harmless: Callable[["ParsedArgs", Any], bool] = _never


class ParsedArgs(argparse.Namespace):
    """The values of all options, and the names of those that were typed."""

    typed: frozenset[str] = frozenset()

    def make(self, kind: type[C], **others: Any) -> C:
        """A frozen group of options.

        Args:
            kind: a dataclass whose fields have the names of options.
            others: fields that are not options.
        """
        names = [field.name for field in fields(kind) if field.name not in others]  # type: ignore[arg-type]  # a dataclass
        return kind(**{name: getattr(self, name) for name in names}, **others)

    def without_effect(self, rules: Sequence["Rule"]) -> Iterator[tuple[str, "Rule"]]:
        """The options that were typed and do not act, each with the rule that says so."""
        for rule in rules:
            for name in rule.options.split():
                if name in self.typed and not rule.acts(self) and not rule.harmless(self, getattr(self, name)):
                    yield name, rule

    def validate(self, rules: Sequence["Rule"]) -> None:
        """Check that every option that was typed acts.

        Raises:
            ConfigError: the first that does not, with what it needs.
        """
        for name, rule in self.without_effect(rules):
            shown = "" if getattr(self, name) is True else f" {getattr(self, name)}"
            raise ConfigError(f"--{name.replace('continue_run', 'continue')}{shown}: acts only {rule.when}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which knows the options that were typed."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None) -> ParsedArgs:  # type: ignore[override]  # one form of it
        """Parse the words."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            try:
                word.encode("utf-8")
            except UnicodeEncodeError:  # files of weights cannot be opened under such a name
                readable = word.encode("utf-8", "backslashreplace").decode("utf-8")
                self.error(f"{readable!r}: expected text in UTF-8")
        untouched = object()
        nothing = argparse.Namespace(**{action.dest: untouched for action in self._actions})
        given = super().parse_args(words, nothing)
        values = super().parse_args(words, ParsedArgs())
        values.typed = frozenset(name for name, value in vars(given).items() if value is not untouched)
        return values

    def error(self, message: str) -> NoReturn:
        """End with one line on stderr and status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def to_settings(values: Mapping[str, object]) -> dict[str, object]:
    """Options as `run.json` holds them, with paths as text and bytes of a name that are not UTF-8 as escapes."""

    def readable(value: object) -> object:
        if isinstance(value, Path | str):
            return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
        return [readable(item) for item in value] if isinstance(value, list | tuple) else value

    return {name: readable(value) for name, value in values.items()}


def split_command(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A script's own words, and those after `--`, which belong to a sampling command."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return value


def project_file(text: str) -> Path:
    """A file or folder: as given, else the project's own of this name (`qdiff.utils.resources.find`)."""
    return find(text)


def seed(text: str) -> int:
    """A seed: 0 to 2^63 - 1."""
    value = int(text) if text.isdigit() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 0 to 2^63 - 1")
    return value


@dataclass(frozen=True)
class DeviceOptions:
    """Where a command works.

    Attributes:
        device: auto | cpu | cuda | mps.
        threads: CPU threads of each process. The order of sums, so the last bits of images, depends on it.
    """

    device: str = "auto"
    threads: int = os.cpu_count() or 1

    def apply(self) -> torch.device:
        """Set the number of threads of this process; the device.

        Raises:
            ConfigError: the device is not present.
        """
        torch.set_num_threads(self.threads)
        return select_device(self.device)


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """How a sampling command runs.

    Attributes:
        continue_run: continue the newest run in the output folder.
        engine: auto | integer | simulated (`qdiff.engines.select`).
        precision: full | autocast (float16 on GPUs, bfloat16 on CPUs that are fast at it).
        verbose: log details.
    """

    continue_run: bool = False
    engine: str = "auto"
    precision: str = "full"
    verbose: bool = False


def add_device_options(group: argparse._ActionsContainer) -> None:
    """Add --device and --threads to a parser or to a group of one."""
    choices = ["auto", "cpu", "cuda", "mps"]
    group.add_argument("--device", default="auto", choices=choices, help="auto: the best one present")
    words = "CPU threads of each process; the same number gives the same bits"
    group.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help=words)


def add_run_options(parser: Parser, precision: str = "full") -> None:
    """Add the options of `RunOptions`; `precision` is the default of --precision."""
    group = parser.add_argument_group("run")
    add_device_options(group)
    words = "continue the newest run in the output folder"
    group.add_argument("--continue", dest="continue_run", action="store_true", help=words)
    words = (
        "products of a quantized network: on integers (CPU), or simulated; auto: integers if they are exact and fast"
    )
    group.add_argument("--engine", default="auto", choices=ENGINES, help=words)
    words = "autocast: float16 on GPUs, bfloat16 on CPUs that are fast at it"
    group.add_argument("--precision", default=precision, choices=["full", "autocast"], help=words)
    group.add_argument("--verbose", action="store_true", help="log details")


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The half precision of --precision that the device is fast at; None: float32."""
    if precision == "full":
        return None
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def run_main(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> None:
    """Call `main`; an error that the user can mend ends in one line on stderr and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 shows replacements
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
        sys.stdout.flush()  # a full disk behind it is an error here, not at the end of Python
    except (ConfigError, CheckpointError) as error:
        fail(error.with_options(OPTION_OF_FIELD))
    except OSError as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory ({first_line(error)}); take a smaller batch")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on (sampling scripts: with --continue)", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> NoReturn:
    """End with one line on stderr and status 1."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
