"""The parser of all scripts, typed groups of options, and errors as one line on stderr."""

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
OptionGroup = TypeVar("OptionGroup")

# The option that sets each field of the library's configurations, for error messages.
SAME_NAME = (
    *("a_sym", "act_bit", "cali_ckpt", "ckpt", "classes", "clip", "config", "device", "engine", "eta"),
    *("keep", "layer_bits", "quant_act", "quant_mode", "resume_w", "sample_type", "skip_type", "sm_abit", "split"),
    *("timestep_groups", "use_pretrained", "weight_bit", "weight_scale_method"),
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
    "policy_budget": "--cali_policy_budget",
    "samples": "--cali_n",
    "smoothing": "--cali_smoothing",
}


class Extend(argparse.Action):
    """Collects the values of an option that may be given several times, each time with one or more values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Append the values to those that were given before."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(before if isinstance(before, tuple) else ()), *values))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default value of an option to its help text, unless the text mentions it or the value is empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_no_value = action.default is False or action.default in (None, [])
        if has_no_value or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _never_harmless(args: "ParsedArgs", value: object) -> bool:
    return False


@dataclass(frozen=True)
class Rule:
    """States when options have an effect. An option that was given and has no effect is refused.

    Attributes:
        options: the names of the options, separated by spaces.
        acts: whether the options have an effect, from the values of all options.
        when: the condition as text, for the error message.
        harmless: whether a value of the options agrees with what happens anyway, and is accepted.
    """

    options: str
    acts: Callable[["ParsedArgs"], bool]
    when: str
    harmless: Callable[["ParsedArgs", Any], bool] = _never_harmless


class ParsedArgs(argparse.Namespace):
    """The values of all options, and the names of the options that were given on the command line.

    Attributes:
        typed: the names of the given options.
    """

    typed: frozenset[str] = frozenset()

    def make(self, kind: type[OptionGroup], **others: Any) -> OptionGroup:
        """Make a typed group of options.

        Args:
            kind: a dataclass whose fields have the names of options.
            others: the values of fields that are not options.
        """
        names = [field.name for field in fields(kind) if field.name not in others]  # type: ignore[arg-type]  # a dataclass
        return kind(**{name: getattr(self, name) for name in names}, **others)

    def without_effect(self, rules: Sequence["Rule"]) -> Iterator[tuple[str, "Rule"]]:
        """The given options that have no effect, each with the rule that it breaks."""
        for rule in rules:
            for name in rule.options.split():
                if name in self.typed and not rule.acts(self) and not rule.harmless(self, getattr(self, name)):
                    yield name, rule

    def validate(self, rules: Sequence["Rule"]) -> None:
        """Check that every given option has an effect.

        Raises:
            ConfigError: the first option without an effect, and what it needs.
        """
        for name, rule in self.without_effect(rules):
            value = getattr(self, name)
            shown = "" if value is True else f" {' '.join(value) if isinstance(value, tuple) else value}"
            raise ConfigError(f"--{name.replace('continue_run', 'continue')}{shown}: acts only {rule.when}")


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors as one line and remembers which options were given."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None) -> ParsedArgs:  # type: ignore[override]  # one form of it
        """Parse the arguments of a command; None: those of this process."""
        args = sys.argv[1:] if args is None else args
        for arg in args:
            try:
                arg.encode("utf-8")
            except UnicodeEncodeError:  # files of weights cannot be opened under such a name
                readable = arg.encode("utf-8", "backslashreplace").decode("utf-8")
                self.error(f"{readable!r}: expected text in UTF-8")
        not_given = object()
        markers = argparse.Namespace(**{action.dest: not_given for action in self._actions})
        given = super().parse_args(args, markers)
        values = super().parse_args(args, ParsedArgs())
        values.typed = frozenset(name for name, value in vars(given).items() if value is not not_given)
        return values

    def error(self, message: str) -> NoReturn:
        """Exit with one line on stderr and status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def to_settings(values: Mapping[str, object]) -> dict[str, object]:
    """Convert the values of options to the form of `run.json`: paths as text, with escapes for bytes not in UTF-8."""

    def readable(value: object) -> object:
        if isinstance(value, Path | str):
            return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
        return [readable(item) for item in value] if isinstance(value, list | tuple) else value

    return {name: readable(value) for name, value in values.items()}


def split_command(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Split the arguments of a script at `--`. The arguments behind it belong to a sampling command."""
    args = list(sys.argv[1:] if argv is None else argv)
    end = args.index("--") if "--" in args else len(args)
    return args[:end], args[end + 1 :]


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return value


def project_file(text: str) -> Path:
    """Parse a path. If nothing exists there, the project's file or folder of this name is taken."""
    return find(text)


def seed(text: str) -> int:
    """Parse a seed, 0 to 2^63 - 1."""
    value = int(text) if text.isdigit() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 0 to 2^63 - 1")
    return value


@dataclass(frozen=True)
class DeviceOptions:
    """The device of a command.

    Attributes:
        device: auto | cpu | cuda | mps.
        threads: CPU threads of each process. The order of sums depends on it, and so do the last bits of images.
    """

    device: str = "auto"
    threads: int = os.cpu_count() or 1

    def apply(self) -> torch.device:
        """Set the number of threads of this process, and return the device.

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
        engine: auto | integer | integer_packed | simulated (`qdiff.engines.select`).
        precision: full | autocast (float16 on GPUs; bfloat16 on CPUs that support it, else float32).
        verbose: log details.
    """

    continue_run: bool = False
    engine: str = "auto"
    precision: str = "full"
    verbose: bool = False


def add_device_options(group: argparse._ActionsContainer) -> None:
    """Add --device and --threads to a parser or to one of its groups."""
    choices = ["auto", "cpu", "cuda", "mps"]
    group.add_argument("--device", default="auto", choices=choices, help="device; auto: the fastest one present")
    help_text = "CPU threads of each process; the last bits of images depend on it"
    group.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help=help_text)


def add_run_options(parser: Parser, precision: str = "full") -> None:
    """Add the options of `RunOptions`. `precision` is the default of --precision."""
    group = parser.add_argument_group("run")
    add_device_options(group)
    help_text = "continue the newest run in the output folder"
    group.add_argument("--continue", dest="continue_run", action="store_true", help=help_text)
    help_text = (
        "arithmetic of a quantized network: integer, integer_packed (CUDA, 4-bit weights stay packed) or simulated; "
        "auto: integer if it is exact and fast"
    )
    group.add_argument("--engine", default="auto", choices=ENGINES, help=help_text)
    help_text = "autocast: float16 on GPUs, bfloat16 on CPUs that support it"
    group.add_argument("--precision", default=precision, choices=["full", "autocast"], help=help_text)
    group.add_argument("--verbose", action="store_true", help="log details")


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The half-precision type that --precision selects on the device; None: float32."""
    if precision == "full":
        return None
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def run_main(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> None:
    """Call `main`. An error that the user can fix ends in one line on stderr and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without UTF-8 shows escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
        sys.stdout.flush()  # reports a full disk here, not when Python exits
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
    """Exit with one line on stderr and status 1."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
