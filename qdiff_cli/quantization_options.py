"""The quantization options of the published scripts: their parser, when each of them acts, and what they resolve to."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qdiff.calibration.data import validate_num_timesteps
from qdiff.checkpoint import PackedFile
from qdiff.config import MODES, PRESETS, CalibrationConfig, QuantConfig
from qdiff.errors import ConfigError
from qdiff.scale_rules import SCALE_RULES
from qdiff.task import QuantizationTask
from qdiff_cli.options import Parser, Rule, positive, project_file

OWN_TIMESTEPS, OWN_SAMPLES = 20, 256  # at most, of a calibration set that is generated: the paper's

# For each option of the recipe: the field of `CalibrationConfig`, its type, and the help text.
RECIPE_OPTIONS: dict[str, tuple[str, Callable[[str], int | float], str]] = {
    "cali_batch_size": ("batch_size", positive, "samples of one batch"),
    "cali_iters": ("iters", int, "iterations of AdaRound per unit"),
    "cali_lr_w": ("lr", float, "learning rate of AdaRound"),
    "cali_iters_a": ("iters_a", int, "iterations of the activation scales per unit"),
    "cali_lr": ("lr_a", float, "learning rate of the activation scales"),
    "cali_p": ("p", float, "norm of the activation reconstruction loss"),
    "cali_iters_tune": ("iters_tune", int, "iterations of the end-to-end fine-tuning after the units"),
}


@dataclass(frozen=True)
class QuantizationOptions:
    """The options, under their published names and with their defaults; `add_quantization_options` describes them."""

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
    cali_cache_gb: float | None = None

    def resolve(self, task: QuantizationTask, run_seed: int) -> "QuantizationConfig | None":
        """What the options mean for a model; None without --ptq.

        Args:
            task: the model.
            run_seed: the seed of the calibration.

        Raises:
            ConfigError: settings that cannot work.
        """
        if not self.ptq:
            return None
        recipe = self._recipe(task.evaluations, run_seed)
        if self.timestep_groups > recipe.num_timesteps:
            message = f" {self.timestep_groups}: the calibration set has {recipe.num_timesteps} time steps (--cali_st)"
            raise ConfigError(message, field="timestep_groups")
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
        """The number formats; `linear` always takes min-max ranges, the preset `fast` searches ranges by `mse`."""
        linear, fast = self.quant_mode == "linear", self.preset == "fast"
        weights = self.weight_scale_method or ("mse" if fast else task.weight_scale_method)
        acts = "max" if self.a_min_max else "mse" if fast else task.act_scale_method
        return QuantConfig(
            weight_bit=self.weight_bit,
            act_bit=self.act_bit,
            quant_act=self.quant_act,
            sm_abit=self.sm_abit,
            a_sym=self.a_sym,
            split=self.split,
            weight_scale_method="max" if linear else weights,
            act_scale_method="max" if linear else acts,
            quant_mode=self.quant_mode,
        ).validate()

    def _recipe(self, evaluations: int, run_seed: int) -> CalibrationConfig:
        """The recipe; time steps and samples depend on where the set comes from and on the sampler's evaluations."""
        generated, preset = self.cali_data_path is None, PRESETS[self.preset]
        values = {field: getattr(self, option) for option, (field, _, _) in RECIPE_OPTIONS.items()}
        if generated and self.cali_st and (self.resume_w or not self.cali_ckpt):
            validate_num_timesteps(self.cali_st, evaluations)
        num_timesteps = min(OWN_TIMESTEPS, evaluations) if generated else preset.num_timesteps
        samples = min(OWN_SAMPLES, preset.samples) if generated else preset.samples
        return replace(
            preset,
            num_timesteps=self.cali_st or num_timesteps,
            samples=self.cali_n or samples,
            running_stat=self.running_stat,
            rs_sm_only=self.rs_sm_only,
            seed=run_seed,
            **{field: value for field, value in values.items() if value is not None},
        ).validate()


@dataclass(frozen=True)
class QuantizationConfig:
    """What the options resolve to: how a network is quantized, and where the result comes from.

    Attributes:
        formats: the number formats.
        recipe: the recipe of a calibration.
        checkpoint: a calibrated checkpoint to load; None: calibrate.
        weights_only: take the weights of `checkpoint` and calibrate the activations.
        data_file: the calibration set; None: it is generated.
        timestep_groups: the number of groups of time steps with activation scales of their own.
        samples_given: the number of samples was asked for, so that a smaller set is worth a warning.
        cache_bytes: memory for activations; None: half of what is free.
    """

    formats: QuantConfig
    recipe: CalibrationConfig
    checkpoint: Path | None = None
    weights_only: bool = False
    data_file: Path | None = None
    timestep_groups: int = 1
    samples_given: bool = False
    cache_bytes: int | None = None


def add_quantization_options(parser: Parser) -> None:
    """Add the options of `QuantizationOptions`, with published names and defaults."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--ptq", action="store_true", help="quantize the network")
    group.add_argument("--quant_act", action="store_true", help="quantize activations too")
    group.add_argument("--weight_bit", type=int, default=8)
    group.add_argument("--act_bit", type=int, default=8)
    group.add_argument("--sm_abit", type=int, default=8, help="bits of the attention probabilities")
    words = "linear: nearest rounding, no reconstruction"
    group.add_argument("--quant_mode", default="qdiff", choices=MODES, help=words)
    words = "scale rule of the weights (default: the family's published rule)"
    group.add_argument("--weight_scale_method", choices=SCALE_RULES.names(), help=words)
    group.add_argument("--a_sym", action="store_true", help="symmetric activations")
    group.add_argument("--a_min_max", action="store_true", help="min-max activation ranges")
    group.add_argument("--running_stat", action="store_true", help="moving averages for the activation ranges")
    words = "moving averages for attention probabilities only"
    group.add_argument("--rs_sm_only", action="store_true", help=words)
    words = "calibrate activation scales for this number of groups of time steps (packed files only)"
    group.add_argument("--timestep_groups", type=positive, default=1, help=words)
    group.add_argument("--split", action="store_true", help="two quantizers for concatenated shortcuts")
    words = "the model is conditional (accepted for the published commands)"
    group.add_argument("--cond", action="store_true", help=words)
    words = "calibrated checkpoint, published (.pth) or packed (.safetensors)"
    group.add_argument("--cali_ckpt", type=project_file, help=words)
    group.add_argument("--cali_data_path", help="calibration set; without it and --cali_ckpt one is generated")
    group.add_argument("--resume", action="store_true", help="accepted beside --cali_ckpt, changes nothing")
    words = "weights from --cali_ckpt, calibrate activations only"
    group.add_argument("--resume_w", action="store_true", help=words)
    defaults = f"{CalibrationConfig.num_timesteps} of a file, {OWN_TIMESTEPS} of a generated one"
    words = f"time steps used of the calibration set (default: {defaults})"
    group.add_argument("--cali_st", type=positive, help=words)
    defaults = f"{_preset_values('samples')}; of a generated set at most {OWN_SAMPLES}"
    group.add_argument("--cali_n", type=positive, help=f"samples of each time step (default: {defaults})")
    words = "the recipe: the paper's, or one that takes a small part of its time"
    group.add_argument("--preset", default="published", choices=list(PRESETS), help=words)
    for option, (field, kind, words) in RECIPE_OPTIONS.items():
        group.add_argument(f"--{option}", type=kind, help=f"{words} (default: {_preset_values(field)})")
    words = "memory for activations, the rest goes to files (default: half of what is free)"
    group.add_argument("--cali_cache_gb", type=float, help=words)


def _preset_values(field: str) -> str:
    return ", ".join(f"{getattr(preset, field):g} {name}" for name, preset in PRESETS.items())


_LOADS = "in a calibration: --cali_ckpt loads a finished one"
_WEIGHTS = "cali_iters cali_lr_w weight_scale_method"
_SCALES = "cali_iters_a cali_lr cali_p"
_RANGES = "a_min_max running_stat rs_sm_only"
# `linear` has no reconstruction, so these change nothing there
RECONSTRUCTION_OPTIONS = ("cali_cache_gb", "cali_iters_tune", *_WEIGHTS.split(), *_SCALES.split())
_RECIPE = (
    f"cali_data_path cali_st cali_n preset cali_batch_size cali_cache_gb cali_iters_tune {_RANGES} {_WEIGHTS} {_SCALES}"
)
# When the quantization options act, in the order in which violations are reported. --cond, --resume and --no_grad_ckpt
# change nothing and are always accepted.
RULES = (
    Rule(
        f"quant_act weight_bit act_bit sm_abit quant_mode a_sym split cali_ckpt resume_w {_RECIPE}",
        lambda args: args.ptq,
        "with --ptq",
    ),
    Rule("resume_w", lambda args: bool(args.cali_ckpt), "with --cali_ckpt FILE, to take the weights from"),
    Rule("resume_w", lambda args: args.quant_act, "with --quant_act: there is nothing else to calibrate"),
    Rule(f"act_bit sm_abit a_sym {_RANGES} {_SCALES}", lambda args: args.quant_act, "with --quant_act"),
    Rule(_RECIPE, lambda args: args.resume_w or not args.cali_ckpt, _LOADS),
    Rule(
        "timestep_groups",
        lambda args: args.ptq and args.quant_act and (args.resume_w or not args.cali_ckpt),
        "in a calibration with --quant_act",
        lambda args, value: value == 1,
    ),
    Rule(  # a packed file says itself how it was calibrated
        "quant_mode",
        lambda args: not args.cali_ckpt or PackedFile.find(args.cali_ckpt) is not None,
        _LOADS,
        lambda args, value: value == "qdiff",
    ),
    Rule(_WEIGHTS, lambda args: not args.resume_w, "without --resume_w, which takes the weights from a file"),
    Rule(
        f"weight_scale_method cali_iters cali_lr_w cali_iters_tune cali_cache_gb resume_w {_SCALES}",
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
