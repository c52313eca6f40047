"""Options: one parser for all scripts, bad input ends in one line on stderr."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from qdiff.calibration.dataset import check_steps
from qdiff.checkpoint import CheckpointError
from qdiff.config import PRESETS, CalibrationConfig, ConfigError, QuantConfig
from qdiff.integer import ENGINES
from qdiff.resources import find

log = logging.getLogger(__name__)

# scripts that sample, with the module of `qdiff_cli.commands` behind each
JOB_NAMES = {"sample_diffusion_ddim.py": "sample_ddim", "sample_diffusion_ldm.py": "sample_ldm", "txt2img.py": "txt2img"}
OWN_STEPS, OWN_SAMPLES = 20, 256  # at most, of a calibration set that is generated: the paper's


def printable(args: argparse.Namespace) -> dict[str, object]:
    """The options as they are kept in files, paths as text."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to a help text, unless that speaks of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or "default" in (action.help or "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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
    """A file or folder: as given, else one of the project's own of this name (`qdiff.resources.find`)."""
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
    "cali_iters_tune": ("iters_tune", int, "iterations of step sizes, biases and normalizations together, after the units"),
}


def add_device_options(group: argparse._ActionsContainer) -> None:
    """--device and --threads, for a parser or a group of one."""
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: the best one present")
    group.add_argument(
        "--threads", type=positive, default=os.cpu_count() or 1, help="CPU threads of each process; the same number gives the same bits"
    )


def add_run_options(parser: Parser, resumable: bool = True, precision: str = "full") -> None:
    group = parser.add_argument_group("run")
    add_device_options(group)
    if resumable:
        group.add_argument("--continue", dest="continue_run", action="store_true", help="continue the newest run in the output folder")
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
    group.add_argument("--quant_mode", default="qdiff", choices=["qdiff", "linear"], help="linear: nearest rounding, no reconstruction")
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
        "--time_sets", type=positive, default=1, help="calibrate activation step sizes for each of so many sets of time steps (packed only)"
    )
    group.add_argument("--split", action="store_true", help="two quantizers for concatenated shortcuts")
    group.add_argument("--cond", action="store_true", help="the model is conditional (accepted for the published commands)")
    group.add_argument("--cali_ckpt", type=project_file, help="calibrated checkpoint, published (.pth) or packed (.safetensors)")
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
        "--preset", default="published", choices=list(PRESETS), help="the recipe: the paper's, or one that takes a small part of its time"
    )
    for option, (field, kind, words) in RECIPE_OPTIONS.items():
        group.add_argument(f"--{option}", type=kind, help=f"{words} (default: {preset_values(field)})")
    group.add_argument("--cali_cache_gb", type=float, help="memory for activations, the rest goes to files (default: half of what is free)")


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
    given = {field: getattr(args, option) for option, (field, _, _) in RECIPE_OPTIONS.items() if getattr(args, option) is not None}
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


def check_quant_options(args: argparse.Namespace) -> None:
    """Combinations that cannot be meant."""
    if args.resume_w and not args.cali_ckpt:
        raise ConfigError("--resume_w: expected --cali_ckpt FILE to take the weights from")
    if args.resume_w and not args.quant_act:
        raise ConfigError("--resume_w: expected --quant_act, there is nothing else to calibrate")
    if not args.ptq and (args.cali_ckpt or args.cali_data_path or args.quant_act):
        raise ConfigError("--cali_ckpt, --cali_data_path and --quant_act need --ptq")
    if args.time_sets > 1 and args.running_stat:
        raise ConfigError("--time_sets and --running_stat: expected one of them")
    if args.engine == "integer" and not (args.ptq and args.quant_act):
        raise ConfigError("--engine integer: expected --ptq and --quant_act, only quantized activations make integer products")


def select_device(name: str) -> torch.device:
    """The device of `--device`; ConfigError where it is not there."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present[name]:
        raise ConfigError(f"--device {name}: not present here; found {', '.join(kind for kind, there in present.items() if there)}")
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
    try:
        main(argv)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on (sampling scripts: with --continue)", file=sys.stderr)
        sys.exit(130)
