"""Options: one parser for all scripts, bad input ends in one line on stderr."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch

from qdiff.calibration.data import check_steps
from qdiff.checkpoint import is_packed
from qdiff.checkpoint.reading import first_line
from qdiff.config import PRESETS, CalibrationConfig, QuantConfig
from qdiff.engines.select import ENGINES
from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.memory import is_out_of_memory
from qdiff.utils.resources import find

log = logging.getLogger(__name__)

# scripts that sample, with the module of `qdiff_cli.commands` behind each
JOB_NAMES = {
    "sample_diffusion_ddim.py": "sample_ddim",
    "sample_diffusion_ldm.py": "sample_ldm",
    "txt2img.py": "txt2img",
}
OWN_STEPS, OWN_SAMPLES = 20, 256  # at most, of a calibration set that is generated: the paper's


def printable(args: argparse.Namespace) -> dict[str, object]:
    """The options as they are kept in files, paths as text."""

    def readable(value: object) -> object:
        if isinstance(value, Path | str):  # bytes of a name that are no UTF-8 become escapes
            return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
        return [readable(item) for item in value] if isinstance(value, list) else value

    return {key: readable(value) for key, value in vars(args).items() if key != "typed"}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to a help text, unless that speaks of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help
            if action.default is None or "default" in (action.help or "")
            else super()._get_help_string(action)
        )


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The options, each with its value; `typed` among them: the names of those that were given."""
        for word in sys.argv[1:] if args is None else args:
            try:
                word.encode("utf-8")
            except UnicodeEncodeError:  # files of weights cannot be opened under such a name
                self.error(f"{word.encode('utf-8', 'backslashreplace').decode('utf-8')!r}: expected text in UTF-8")
        untouched = object()
        given = super().parse_args(args, argparse.Namespace(**{action.dest: untouched for action in self._actions}))
        values = super().parse_args(args)
        values.typed = Typed(name for name, value in vars(given).items() if value is not untouched)
        return values

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Typed(frozenset):
    """Names of options that were given, not left at their defaults."""


def split_command(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """A script's own words, and those after `--`, which go to a sampling command."""
    words = sys.argv[1:] if argv is None else argv
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return value


def project_file(text: str) -> Path:
    """A file or folder: as given, else one of the project's own of this name (`qdiff.utils.resources.find`)."""
    return find(text)


def seed(text: str) -> int:
    """A seed: 0 to 2^63 - 1."""
    value = int(text) if text.isdigit() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 0 to 2^63 - 1")
    return value


RECIPE_OPTIONS: dict[str, tuple[str, Callable[[str], int | float], str]] = {
    "cali_batch_size": ("batch_size", positive, "rows of one batch"),
    "cali_iters": ("iters", int, "iterations of AdaRound per unit"),
    "cali_lr_w": ("lr", float, "learning rate of AdaRound"),
    "cali_iters_a": ("iters_a", int, "iterations of the activation step sizes per unit"),
    "cali_lr": ("lr_a", float, "learning rate of the activation step sizes"),
    "cali_p": ("p", float, "norm of the activation reconstruction loss"),
    "cali_iters_tune": (
        "iters_tune",
        int,
        "iterations of step sizes, biases and normalizations together, after the units",
    ),
}


def add_device_options(group: argparse._ActionsContainer) -> None:
    """--device and --threads, for a parser or a group of one."""
    group.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: the best one present"
    )
    group.add_argument(
        "--threads",
        type=positive,
        default=os.cpu_count() or 1,
        help="CPU threads of each process; the same number gives the same bits",
    )


def add_run_options(parser: Parser, resumable: bool = True, precision: str = "full") -> None:
    group = parser.add_argument_group("run")
    add_device_options(group)
    if resumable:
        group.add_argument(
            "--continue", dest="continue_run", action="store_true", help="continue the newest run in the output folder"
        )
        words = "products of a quantized network: on integers (CPU), or simulated; auto: integers where they are exact and fast"
        group.add_argument("--engine", default="auto", choices=ENGINES, help=words)
        words = "autocast: float16 on GPUs, bfloat16 on CPUs that are fast at it"
        group.add_argument("--precision", default=precision, choices=["full", "autocast"], help=words)
    group.add_argument("--verbose", action="store_true", help="log details")


def add_quant_options(parser: Parser) -> None:
    """The shared quantization options, published names and defaults."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--ptq", action="store_true", help="quantize the network")
    group.add_argument("--quant_act", action="store_true", help="quantize activations too")
    group.add_argument("--weight_bit", type=int, default=8)
    group.add_argument("--act_bit", type=int, default=8)
    group.add_argument("--sm_abit", type=int, default=8, help="bits of the attention probabilities")
    group.add_argument(
        "--quant_mode", default="qdiff", choices=["qdiff", "linear"], help="linear: nearest rounding, no reconstruction"
    )
    group.add_argument(
        "--weight_scale_method",
        choices=["max", "max_scale", "mse"],
        help="step sizes of the weights (default: the family's published rule)",
    )
    group.add_argument("--a_sym", action="store_true", help="symmetric activations")
    group.add_argument("--a_min_max", action="store_true", help="min-max activation ranges")
    group.add_argument("--running_stat", action="store_true", help="moving averages for the activation ranges")
    group.add_argument("--rs_sm_only", action="store_true", help="moving averages for attention probabilities only")
    group.add_argument(
        "--timestep_groups",
        type=positive,
        default=1,
        help="calibrate activation step sizes for each of so many sets of time steps (packed only)",
    )
    group.add_argument("--split", action="store_true", help="two quantizers for concatenated shortcuts")
    group.add_argument(
        "--cond", action="store_true", help="the model is conditional (accepted for the published commands)"
    )
    group.add_argument(
        "--cali_ckpt", type=project_file, help="calibrated checkpoint, published (.pth) or packed (.safetensors)"
    )
    group.add_argument("--cali_data_path", help="calibration set; without it and --cali_ckpt one is generated")
    group.add_argument("--resume", action="store_true", help="accepted beside --cali_ckpt, changes nothing")
    group.add_argument("--resume_w", action="store_true", help="weights from --cali_ckpt, calibrate activations only")
    group.add_argument(
        "--cali_st",
        type=positive,
        help=f"time steps used of the calibration set (default: {CalibrationConfig.steps} of a file, {OWN_STEPS} of a generated one)",
    )
    group.add_argument(
        "--cali_n",
        type=positive,
        help=f"samples of each time step (default: {preset_values('samples')}; of a generated set at most {OWN_SAMPLES})",
    )
    group.add_argument(
        "--preset",
        default="published",
        choices=list(PRESETS),
        help="the recipe: the paper's, or one that takes a small part of its time",
    )
    for option, (field, kind, words) in RECIPE_OPTIONS.items():
        group.add_argument(f"--{option}", type=kind, help=f"{words} (default: {preset_values(field)})")
    group.add_argument(
        "--cali_cache_gb",
        type=float,
        help="memory for activations, the rest goes to files (default: half of what is free)",
    )


def preset_values(field: str) -> str:
    return ", ".join(f"{getattr(preset, field):g} {name}" for name, preset in PRESETS.items())


def quant_config(args: argparse.Namespace, weight_method: str, act_method: str) -> QuantConfig:
    """The number formats asked for; `linear` always takes min-max ranges, `--preset fast` searches them by `mse`."""
    linear = args.quant_mode == "linear"
    if args.preset == "fast":
        weight_method = act_method = "mse"
    return QuantConfig(
        weight_bit=args.weight_bit,
        act_bit=args.act_bit,
        quant_act=args.quant_act,
        sm_abit=args.sm_abit,
        a_sym=args.a_sym,
        split=args.split,
        weight_scale_method="max" if linear else args.weight_scale_method or weight_method,
        act_scale_method="max" if linear or args.a_min_max else act_method,
        quant_mode=args.quant_mode,
    ).validate()


def calibration_config(args: argparse.Namespace, evaluations: int) -> CalibrationConfig:
    """The recipe asked for; steps and samples depend on where the set comes from, and on how often the sampler calls the network.

    Raises:
        ConfigError: settings that cannot work; more time steps than the sampler makes.
    """
    own, preset = args.cali_data_path is None, PRESETS[args.preset]
    given = {
        field: getattr(args, option)
        for option, (field, _, _) in RECIPE_OPTIONS.items()
        if getattr(args, option) is not None
    }
    if own and args.cali_st and (args.resume_w or not args.cali_ckpt):
        check_steps(args.cali_st, evaluations)
    return replace(
        preset,
        steps=args.cali_st or (min(OWN_STEPS, evaluations) if own else preset.steps),
        samples=args.cali_n or (min(OWN_SAMPLES, preset.samples) if own else preset.samples),
        running_stat=args.running_stat,
        rs_sm_only=args.rs_sm_only,
        seed=args.seed,
        **given,
    ).validate()


@dataclass(frozen=True)
class Rule:
    """When options act.

    options: their names. acts: from all options to whether these act. when: that in words. harmless: a value of these that asks for
    what happens anyway.
    """

    options: str
    acts: Callable[[argparse.Namespace], bool]
    when: str
    harmless: Callable[[argparse.Namespace, object], bool] = lambda args, value: False


def _calibrates(args: argparse.Namespace) -> bool:
    """Whether the command calibrates, and not only loads."""
    return args.ptq and (args.resume_w or not args.cali_ckpt)


_LOADS = "in a calibration: --cali_ckpt loads a finished one"
_WEIGHTS = "cali_iters cali_lr_w weight_scale_method"
_STEP_SIZES = "cali_iters_a cali_lr cali_p"
# An option that was typed and does not act is refused; the order is that in which they are told. --cond, --resume and --no_grad_ckpt
# stand for nothing and are always accepted.
RULES = (
    Rule(
        f"quant_act weight_bit act_bit sm_abit quant_mode a_sym a_min_max running_stat rs_sm_only split cali_ckpt cali_data_path resume_w "
        f"cali_st cali_n preset cali_batch_size cali_cache_gb cali_iters_tune {_WEIGHTS} {_STEP_SIZES}",
        lambda args: args.ptq,
        "with --ptq",
    ),
    Rule("resume_w", lambda args: bool(args.cali_ckpt), "with --cali_ckpt FILE, to take the weights from"),
    Rule("resume_w", lambda args: args.quant_act, "with --quant_act: there is nothing else to calibrate"),
    Rule(
        f"act_bit sm_abit a_sym a_min_max running_stat rs_sm_only {_STEP_SIZES}",
        lambda args: args.quant_act,
        "with --quant_act",
    ),
    Rule(
        f"cali_data_path cali_st cali_n preset cali_batch_size cali_cache_gb cali_iters_tune a_min_max running_stat rs_sm_only "
        f"{_WEIGHTS} {_STEP_SIZES}",
        _calibrates,
        _LOADS,
    ),
    Rule(
        "timestep_groups",
        lambda args: _calibrates(args) and args.quant_act,
        "in a calibration with --quant_act",
        lambda args, value: value == 1,
    ),
    Rule(  # a packed file says itself how it was made
        "quant_mode",
        lambda args: not args.cali_ckpt or is_packed(args.cali_ckpt),
        _LOADS,
        lambda args, value: value == "qdiff",
    ),
    Rule(_WEIGHTS, lambda args: not args.resume_w, "without --resume_w, which takes the weights from a file"),
    Rule(
        f"weight_scale_method cali_iters cali_lr_w cali_iters_tune cali_cache_gb resume_w {_STEP_SIZES}",
        lambda args: args.quant_mode != "linear",
        "with --quant_mode qdiff: linear rounds to nearest with min-max ranges",
        lambda args, value: value == "max" or (value == 0 and value is not False),
    ),
    Rule("rs_sm_only", lambda args: args.running_stat, "with --running_stat"),
    Rule("running_stat", lambda args: args.timestep_groups == 1, "without --timestep_groups: expected one of them"),
    Rule(
        "engine",
        lambda args: args.ptq and args.quant_act,
        "with --ptq and --quant_act: only quantized activations make integer products",
        lambda args, value: value != "integer",
    ),
)


def idle(args: argparse.Namespace, rules: Sequence[Rule]) -> Iterator[tuple[str, Rule]]:
    """The options that were typed and do not act, each with the rule that says so."""
    for rule in rules:
        for name in rule.options.split():
            if name in args.typed and not rule.acts(args) and not rule.harmless(args, getattr(args, name)):
                yield name, rule


def check_typed(args: argparse.Namespace, rules: Sequence[Rule]) -> None:
    """ConfigError for an option that was typed and does not act, with what it needs."""
    for name, rule in idle(args, rules):
        shown = "" if getattr(args, name) is True else f" {getattr(args, name)}"
        raise ConfigError(f"--{name.replace('continue_run', 'continue')}{shown}: acts only {rule.when}")


def split_quantization(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a command without its quantization options, and those by name: the words of each, the last one of a name."""
    parser = Parser("")
    add_quant_options(parser)
    untouched = object()
    given, rest = parser.parse_known_args(
        words, argparse.Namespace(**{action.dest: untouched for action in parser._actions})
    )
    found = {}
    for action in parser._actions:
        if (value := getattr(given, action.dest, untouched)) is not untouched:
            found[action.dest] = [action.option_strings[-1], *([] if value is True else [str(value)])]
    return rest, found


def select_device(name: str) -> torch.device:
    """The device of `--device`; ConfigError where it is not there."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present[name]:
        raise ConfigError(
            f"--device {name}: not present here; found {', '.join(kind for kind, there in present.items() if there)}"
        )
    local = int(os.environ.get("LOCAL_RANK", 0))  # of torchrun: each process of a machine takes another GPU
    return torch.device(name, local % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The half precision of `--precision` that the device is fast at; None: float32."""
    if precision == "full":
        return None
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def run_main(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> None:
    """Call `main`; what a user can mend ends in one line on stderr and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 shows replacements
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
        sys.stdout.flush()  # a full disk behind it is an error here, not at the end of Python
    except (ConfigError, CheckpointError, OSError) as error:
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
