"""The quantization options of the published scripts: their parser, their rules and what they resolve to."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qdiff.calibration.data import validate_num_timesteps
from qdiff.checkpoint import PackedFile
from qdiff.config import MODES, PRESETS, CalibrationConfig, QuantConfig
from qdiff.engines.select import INTEGER_ENGINES
from qdiff.errors import ConfigError
from qdiff.model import QuantPlan
from qdiff.policy import KEEP, Policy, make_policy
from qdiff.scale_rules import FITTED_RULE, SCALE_RULES
from qdiff.task import QuantizationTask
from qdiff_cli.options import Extend, ParsedArgs, Parser, Rule, positive, project_file

# What a calibration with widths per layer needs, for error messages.
OTHER_PRESETS = " or ".join(name for name in PRESETS if name != "published")
NOT_PUBLISHED = f"--preset {OTHER_PRESETS}: published also writes a .pth, which holds one width for all layers"
GENERATED_TIMESTEPS, GENERATED_SAMPLES = 20, 256  # the largest size of a generated calibration set, from the paper


def switch(text: str) -> int:
    """Check the value of an option that switches something off (0) or on (1)."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or 1")
    return int(text)


# For each option of the recipe: the field of `CalibrationConfig`, its type, and the help text.
RECIPE_OPTIONS: dict[str, tuple[str, Callable[[str], int | float], str]] = {
    "cali_batch_size": ("batch_size", positive, "samples of one batch"),
    "cali_iters": ("iters", int, "iterations of AdaRound per unit"),
    "cali_lr_w": ("lr", float, "learning rate of AdaRound"),
    "cali_iters_a": ("iters_a", int, "iterations of the activation scales per unit"),
    "cali_lr": ("lr_a", float, "learning rate of the activation scales"),
    "cali_p": ("p", float, "norm p of the reconstruction loss of activations"),
    "cali_iters_tune": ("iters_tune", int, "iterations of each round of the end-to-end fine-tuning"),
    "cali_policy_budget": (
        "policy_budget",
        float,
        "share by which wider layers may add bytes and operations",
    ),
    "cali_smoothing": ("smoothing", switch, "1: smooth outliers of activations where it pays; 0: nowhere"),
}


@dataclass(frozen=True)
class QuantizationOptions:
    """The options with their published names and defaults. `add_quantization_options` describes them."""

    ptq: bool = False
    quant_act: bool = False
    weight_bit: int = 8
    act_bit: int = 8
    sm_abit: int = 8
    quant_mode: str = "qdiff"
    weight_scale_method: str | None = None
    a_sym: bool = False
    a_min_max: bool = False
    running_stat: bool = False
    rs_sm_only: bool = False
    timestep_groups: int = 1
    split: bool = False
    layer_bits: tuple[str, ...] | None = None
    keep: tuple[str, ...] | None = None
    cond: bool = False
    cali_ckpt: Path | None = None
    cali_data_path: str | None = None
    resume: bool = False
    resume_w: bool = False
    cali_st: int | None = None
    cali_n: int | None = None
    preset: str = "published"
    cali_batch_size: int | None = None
    cali_iters: int | None = None
    cali_lr_w: float | None = None
    cali_iters_a: int | None = None
    cali_lr: float | None = None
    cali_p: float | None = None
    cali_iters_tune: int | None = None
    cali_policy_budget: float | None = None
    cali_smoothing: int | None = None
    cali_cache_gb: float | None = None

    def resolve(self, task: QuantizationTask, run_seed: int) -> "QuantizationConfig | None":
        """Resolve the options for a model; None without --ptq.

        Args:
            task: the model.
            run_seed: the seed of the calibration.

        Raises:
            ConfigError: a setting that cannot work.
        """
        if not self.ptq:
            return None
        recipe = self._recipe(task.evaluations, run_seed)
        if self.timestep_groups > recipe.num_timesteps:
            message = f" {self.timestep_groups}: the calibration set has {recipe.num_timesteps} time steps (--cali_st)"
            raise ConfigError(message, field="timestep_groups")
        self._validate_patterns(task)
        return QuantizationConfig(
            formats=self._formats(task),
            recipe=recipe,
            checkpoint=self.cali_ckpt,
            weights_only=self.resume_w,
            data_file=None if self.cali_data_path is None else Path(self.cali_data_path),
            timestep_groups=self.timestep_groups,
            samples_given=self.cali_n is not None,
            cache_bytes=None if self.cali_cache_gb is None else int(self.cali_cache_gb * 1e9),
        )

    def _formats(self, task: QuantizationTask) -> QuantConfig:
        """The number formats. `linear` always uses min-max ranges; only `published` uses the rules of the family."""
        linear, published = self.quant_mode == "linear", self.preset == "published"
        weight_rule = self.weight_scale_method or (task.weight_scale_method if published else FITTED_RULE)
        act_rule = "max" if self.a_min_max else task.act_scale_method if published else FITTED_RULE
        return QuantConfig(
            weight_bit=self.weight_bit,
            act_bit=self.act_bit,
            quant_act=self.quant_act,
            sm_abit=self.sm_abit,
            a_sym=self.a_sym,
            split=self.split,
            weight_scale_method="max" if linear else weight_rule,
            act_scale_method="max" if linear else act_rule,
            quant_mode=self.quant_mode,
            policy=self._policy(),
        ).validate()

    def _policy(self) -> Policy:
        """The widths per layer of a calibration. A file that is loaded has its own."""
        if self.cali_ckpt is None:
            return (*layer_bits_policy(self.layer_bits or ()), *keep_policy(self.keep or ()))
        packed = PackedFile.find(self.cali_ckpt) if self.resume_w else None
        policy = () if packed is None else packed.info.config.policy
        if policy and self.preset == "published":
            message = f" {self.cali_ckpt}: its layers have widths of their own; expected {NOT_PUBLISHED}"
            raise ConfigError(message, field="resume_w")
        return policy

    def _validate_patterns(self, task: QuantizationTask) -> None:
        """Raise ConfigError for a pattern that matches no layer of the network, before any work."""
        policies = {"layer_bits": layer_bits_policy(self.layer_bits or ()), "keep": keep_policy(self.keep or ())}
        if not any(policies.values()):
            return
        with torch.device("meta"):
            network = task.architecture.make_unet(task.unet_config)
        for name, policy in policies.items():
            try:
                QuantPlan.of(network, task.architecture, QuantConfig(split=self.split, policy=policy))
            except ConfigError as error:
                raise error.renamed({"policy": name}) from None

    def _recipe(self, evaluations: int, run_seed: int) -> CalibrationConfig:
        """The recipe. Its numbers of time steps and samples depend on whether the calibration set is generated.

        Args:
            evaluations: the number of evaluations of the network by the sampler.
            run_seed: the seed of the calibration.
        """
        generated, preset = self.cali_data_path is None, PRESETS[self.preset]
        values = {field: getattr(self, option) for option, (field, _, _) in RECIPE_OPTIONS.items()}
        if generated and self.cali_st and (self.resume_w or not self.cali_ckpt):
            validate_num_timesteps(self.cali_st, evaluations)
        num_timesteps = min(GENERATED_TIMESTEPS, evaluations) if generated else preset.num_timesteps
        samples = min(GENERATED_SAMPLES, preset.samples) if generated else preset.samples
        return replace(
            preset,
            num_timesteps=self.cali_st or num_timesteps,
            samples=self.cali_n or samples,
            running_stat=self.running_stat,
            rs_sm_only=self.rs_sm_only,
            seed=run_seed,
            **{field: type(getattr(preset, field))(value) for field, value in values.items() if value is not None},
        ).validate()


@dataclass(frozen=True)
class QuantizationConfig:
    """The resolved options: how a network is quantized, and whether it is loaded or calibrated.

    Attributes:
        formats: the number formats.
        recipe: the recipe of a calibration.
        checkpoint: a calibrated checkpoint to load; None: calibrate.
        weights_only: take the weights from `checkpoint`, and calibrate the activations.
        data_file: the file of the calibration set; None: it is generated.
        timestep_groups: the number of groups of time steps, each with its own activation scales.
        samples_given: the number of samples was given, so a smaller calibration set causes a warning.
        cache_bytes: memory for cached activations, in bytes; None: half of the free memory.
    """

    formats: QuantConfig
    recipe: CalibrationConfig
    checkpoint: Path | None = None
    weights_only: bool = False
    data_file: Path | None = None
    timestep_groups: int = 1
    samples_given: bool = False
    cache_bytes: int | None = None


def layer_bits_policy(entries: tuple[str, ...]) -> Policy:
    """The policy that the values of --layer_bits describe."""
    pairs = [entry.rpartition("=")[::2] for entry in entries]
    return make_policy(pairs, field="layer_bits")


def keep_policy(patterns: tuple[str, ...]) -> Policy:
    """The policy that the values of --keep describe."""
    return make_policy([(pattern, KEEP) for pattern in patterns], field="keep")


def layer_bits(text: str) -> str:
    """Check a value of --layer_bits, PATTERN=WIDTHS."""
    if not text.rpartition("=")[0]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected PATTERN=WIDTHS, such as 'conv_in=A16'")
    try:
        layer_bits_policy((text,))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message.strip()) from None
    return text


def add_quantization_options(parser: Parser) -> None:
    """Add the options of `QuantizationOptions`, with their published names and defaults."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--ptq", action="store_true", help="quantize the network")
    group.add_argument("--quant_act", action="store_true", help="quantize activations too")
    group.add_argument("--weight_bit", type=int, default=8, help="bits of weights")
    group.add_argument("--act_bit", type=int, default=8, help="bits of activations")
    group.add_argument("--sm_abit", type=int, default=8, help="bits of attention probabilities")
    help_text = "qdiff: reconstruction; linear: nearest rounding with min-max ranges"
    group.add_argument("--quant_mode", default="qdiff", choices=MODES, help=help_text)
    help_text = "scale rule of weights (default: the published rule of the model's family)"
    group.add_argument("--weight_scale_method", choices=SCALE_RULES.names(), help=help_text)
    group.add_argument("--a_sym", action="store_true", help="quantize activations symmetrically")
    group.add_argument("--a_min_max", action="store_true", help="use min-max ranges for activations")
    group.add_argument("--running_stat", action="store_true", help="use moving averages for activation ranges")
    group.add_argument("--rs_sm_only", action="store_true", help="use moving averages for attention probabilities only")
    help_text = "number of groups of time steps, each with its own activation scales (only in packed files)"
    group.add_argument("--timestep_groups", type=positive, default=1, help=help_text)
    group.add_argument("--split", action="store_true", help="use two quantizers for concatenated shortcuts")
    help_text = "layers and attention matmuls with other widths, by path; WIDTHS: W8A16, W8 or A16"
    group.add_argument(
        "--layer_bits", type=layer_bits, nargs="+", action=Extend, metavar="PATTERN=WIDTHS", help=help_text
    )
    help_text = "layers and attention matmuls that stay in full precision, by path"
    group.add_argument("--keep", nargs="+", action=Extend, metavar="PATTERN", help=help_text)
    help_text = "no effect; accepted because published commands have it"
    group.add_argument("--cond", action="store_true", help=help_text)
    help_text = "calibrated checkpoint, published (.pth) or packed (.safetensors)"
    group.add_argument("--cali_ckpt", type=project_file, help=help_text)
    group.add_argument("--cali_data_path", help="file of the calibration set (default: a calibration set is generated)")
    group.add_argument("--resume", action="store_true", help="no effect; accepted because published commands have it")
    help_text = "take the weights from --cali_ckpt and calibrate the activations"
    group.add_argument("--resume_w", action="store_true", help=help_text)
    defaults = f"{CalibrationConfig.num_timesteps} from a file, {GENERATED_TIMESTEPS} from a generated set"
    group.add_argument("--cali_st", type=positive, help=f"time steps of the calibration set (default: {defaults})")
    defaults = f"{_preset_values('samples')}; at most {GENERATED_SAMPLES} from a generated set"
    group.add_argument("--cali_n", type=positive, help=f"samples of each time step (default: {defaults})")
    help_text = "recipe: published by the paper, or one that takes a small part of its time"
    group.add_argument("--preset", default="published", choices=list(PRESETS), help=help_text)
    for option, (field, kind, description) in RECIPE_OPTIONS.items():
        group.add_argument(f"--{option}", type=kind, help=f"{description} (default: {_preset_values(field)})")
    help_text = "memory for cached activations in GB, the rest goes to files (default: half of the free memory)"
    group.add_argument("--cali_cache_gb", type=float, help=help_text)


def _preset_values(field: str) -> str:
    """The values of a field in all presets, for help texts."""
    return ", ".join(f"{getattr(preset, field):g} {name}" for name, preset in PRESETS.items())


def _rounds_by_adaround(args: ParsedArgs) -> bool:
    """Whether the preset learns the rounding of weights on the grids of a scale rule."""
    return PRESETS[args.preset].rounding == "adaround"


def _learns_scales(args: ParsedArgs) -> bool:
    """Whether the scales of activations are learned unit by unit."""
    return (PRESETS[args.preset].iters_a if args.cali_iters_a is None else args.cali_iters_a) > 0


def _act_on_weights(args: ParsedArgs) -> bool:
    """Whether every value of --layer_bits has an effect without quantized activations."""
    return all(widths == KEEP or widths.startswith("W") for _, widths in layer_bits_policy(args.layer_bits))


_LOADS = "in a calibration: --cali_ckpt loads a finished one"
_WEIGHTS = "cali_iters cali_lr_w weight_scale_method"
_SCALES = "cali_iters_a cali_lr cali_p"
_POLICY = "layer_bits keep"
_FITTED = "cali_policy_budget cali_smoothing"
_RANGES = "a_min_max running_stat rs_sm_only"
# `linear` has no reconstruction, so these options have no effect on it.
RECONSTRUCTION_OPTIONS = ("cali_cache_gb", "cali_iters_tune", *f"{_WEIGHTS} {_SCALES} {_FITTED}".split())
_RECIPE = (
    "cali_data_path cali_st cali_n preset cali_batch_size cali_cache_gb cali_iters_tune "
    f"{_RANGES} {_WEIGHTS} {_SCALES} {_POLICY} {_FITTED}"
)
# When the quantization options have an effect, in the order in which violations are reported. --cond, --resume and
# --no_grad_ckpt never have one and are always accepted.
RULES = (
    Rule(
        f"quant_act weight_bit act_bit sm_abit quant_mode a_sym split cali_ckpt resume_w {_RECIPE}",
        lambda args: args.ptq,
        "with --ptq",
    ),
    Rule("resume_w", lambda args: bool(args.cali_ckpt), "with --cali_ckpt FILE, to take the weights from"),
    Rule("resume_w", lambda args: args.quant_act, "with --quant_act: there is nothing else to calibrate"),
    Rule(f"act_bit sm_abit a_sym {_RANGES} {_SCALES}", lambda args: args.quant_act, "with --quant_act"),
    Rule("cali_smoothing", lambda args: args.quant_act, "with --quant_act", lambda args, value: value == 0),
    Rule(_RECIPE, lambda args: args.resume_w or not args.cali_ckpt, _LOADS),
    Rule(
        "timestep_groups",
        lambda args: args.ptq and args.quant_act and (args.resume_w or not args.cali_ckpt),
        "in a calibration with --quant_act",
        lambda args, value: value == 1,
    ),
    Rule(  # a packed file stores how it was calibrated, so the option may be repeated beside it
        "quant_mode",
        lambda args: not args.cali_ckpt or PackedFile.find(args.cali_ckpt) is not None,
        _LOADS,
        lambda args, value: value == "qdiff",
    ),
    Rule(
        f"{_WEIGHTS} {_POLICY} {_FITTED}",
        lambda args: not args.resume_w,
        "without --resume_w, which takes the weights from a file",
    ),
    Rule(
        f"weight_scale_method cali_iters cali_lr_w cali_iters_tune cali_cache_gb resume_w {_SCALES} {_FITTED}",
        lambda args: args.quant_mode != "linear",
        "with --quant_mode qdiff: linear rounds to nearest with min-max ranges",
        lambda args, value: value == "max" or (value == 0 and value is not False),
    ),
    Rule("layer_bits", lambda args: args.quant_act or _act_on_weights(args), "with --quant_act: A is for activations"),
    Rule(_POLICY, lambda args: args.preset != "published", f"with {NOT_PUBLISHED}"),
    Rule(_FITTED, lambda args: args.preset != "published", f"with {NOT_PUBLISHED}", lambda args, value: value == 0),
    Rule(
        _WEIGHTS,
        lambda args: _rounds_by_adaround(args) or args.quant_mode == "linear",
        "with --preset published: the others round in closed form, on grids of their own",
        lambda args, value: value == 0,
    ),
    Rule("cali_lr cali_p", _learns_scales, "with --cali_iters_a of 1 or more"),
    Rule("rs_sm_only", lambda args: args.running_stat, "with --running_stat"),
    Rule("running_stat", lambda args: args.timestep_groups == 1, "without --timestep_groups: expected one of them"),
    Rule(
        "engine",
        lambda args: args.ptq and args.quant_act,
        "with --ptq and --quant_act: integer arithmetic needs quantized activations",
        lambda args, value: value not in INTEGER_ENGINES,
    ),
)
