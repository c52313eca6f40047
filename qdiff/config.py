"""What is quantized and how it is calibrated: checked, immutable, and stored in every packed checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from qdiff.errors import ConfigError
from qdiff.policy import Policy, is_kept, make_policy, widths_of
from qdiff.scale_rules import SCALE_RULES

MODES = ("qdiff", "linear")
ROUNDINGS = ("adaround", "compensated", "nearest")
FILE_KEYS = {"num_timesteps": "steps", "validation_fraction": "held_out"}  # of settings with another name in files


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ConfigError(message, field=field)


@dataclass(frozen=True)
class QuantConfig:
    """The simulated number formats.

    Attributes:
        weight_bit: the width of weights, 2 to 16 bits.
        act_bit: the width of activations, 2 to 16 bits.
        quant_act: quantize activations as well as weights.
        sm_abit: the width of attention probabilities, 2 to 16 bits.
        a_sym: symmetric activations: signed integers without zero point.
        split: two quantizers for a concatenated shortcut (Q-Diffusion, section 4.3).
        weight_scale_method: the scale rule of weights (`qdiff.scale_rules`).
        act_scale_method: the scale rule of activations.
        quant_mode: `qdiff` reconstructs, `linear` rounds to nearest.
        time_bounds: the time steps at which each timestep group but the first begins, ascending. Every group has its
            own activation scales. Empty: one group for all time steps.
        policy: layers with other widths than the nominal ones, or in full precision (`qdiff.policy`).
    """

    weight_bit: int = 8
    act_bit: int = 8
    quant_act: bool = False
    sm_abit: int = 8
    a_sym: bool = False
    split: bool = False
    weight_scale_method: str = "max"
    act_scale_method: str = "max"
    quant_mode: str = "qdiff"
    time_bounds: tuple[float, ...] = ()
    policy: Policy = ()

    def validate(self) -> "QuantConfig":
        """Return self.

        Raises:
            ConfigError: a setting that cannot work, by name; a scale rule that is not registered.
        """
        SCALE_RULES.get(self.weight_scale_method, field="weight_scale_method")
        SCALE_RULES.get(self.act_scale_method, field="act_scale_method")
        return self.validate_formats()

    def validate_formats(self) -> "QuantConfig":
        """Return self, without a look at the scale rules: scales that exist need none.

        Raises:
            ConfigError: a setting that cannot work, by name.
        """
        for name in ("weight_bit", "act_bit", "sm_abit"):
            value = getattr(self, name)
            _require(isinstance(value, int) and 2 <= value <= 16, name, f" {value}: expected a width of 2 to 16 bits")
        _require(self.quant_mode in MODES, "quant_mode", f" {self.quant_mode}: expected {' or '.join(MODES)}")
        bounds = list(self.time_bounds)
        _require(bounds == sorted(set(bounds)), "time_bounds", f" {bounds}: expected ascending time steps")
        make_policy(self.policy)
        return self

    def widths(self, path: str) -> tuple[int, int]:
        """The width of the weight and of the input of the layer at `path`."""
        weight, act = widths_of(self.policy, path)
        return weight or self.weight_bit, act or self.act_bit

    def keeps(self, path: str) -> bool:
        """Whether the layer or attention matmul at `path` stays in full precision."""
        return is_kept(self.policy, path)

    def linear(self) -> "QuantConfig":
        """The same widths by nearest rounding and min-max ranges."""
        return replace(self, quant_mode="linear", weight_scale_method="max", act_scale_method="max")

    def to_dict(self) -> dict[str, Any]:
        """The settings as files hold them. An empty policy is left out."""
        return {name: value for name, value in asdict(self).items() if name != "policy" or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantConfig":
        """Rebuild from `to_dict`; older files have no `time_bounds` and no `policy`.

        Raises:
            ConfigError: a setting is unknown, missing or cannot work. Scale rules are not looked up, see
                `validate_formats`.
        """
        values = {"time_bounds": (), "policy": ()} | dict(values)
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"quantization settings {sorted(values)}: expected {sorted(names)}")
        tuples = {"time_bounds": tuple(values["time_bounds"]), "policy": make_policy(values["policy"])}
        return cls(**values | tuples).validate_formats()


@dataclass(frozen=True)
class CalibrationConfig:
    """The recipe of a calibration (Q-Diffusion, section 4; BRECQ; AdaRound). The defaults are the published values.

    Attributes:
        num_timesteps: time steps used of the calibration set (`steps` in files).
        samples: samples of each time step.
        batch_size: samples of one batch.
        iters: iterations of AdaRound for each unit.
        lr: learning rate of AdaRound.
        iters_a: iterations of the activation scales for each unit (LSQ).
        lr_a: learning rate of the activation scales.
        p: norm of the reconstruction loss of the activation scales.
        running_stat: activation ranges are moving averages over all samples.
        rs_sm_only: with `running_stat`, moving averages for attention probabilities only.
        rounding_weight: weight of AdaRound's regularizer in the loss.
        warmup: fraction of `iters` before the regularizer acts.
        validation_fraction: fraction of the samples in the validation split, which chooses the best result and is
            never trained on.
        iters_tune: iterations of the end-to-end fine-tuning of weights, biases and norm affines; 0: none.
        iters_tune_a: iterations of the one that follows with quantized activations, of their scales, biases and norm
            affines; 0: none.
        lr_tune: its learning rate, of the logarithms of the scales; the other parameters take a tenth of it.
        batch_tune: its batch size.
        rounding: how weights are rounded: `adaround` learns it for each unit, `compensated` rounds in closed form and
            moves the errors on (GPTQ, arXiv 2210.17323), `nearest`.
        smoothing: with `compensated` and quantized activations, choose a factor for each input channel of a layer
            (SmoothQuant, arXiv 2211.10438) where it pays.
        unit_samples: with `compensated`, samples of the training split that layers are rounded on; 0: all.
        policy_budget: the most that bytes and bit operations may grow, as a share, by giving more bits to the layers
            that disturb the output most; 0: all layers have the nominal widths.
        seed: seed of the random order of samples and of the batches.
    """

    num_timesteps: int = 1
    samples: int = 1024
    batch_size: int = 32
    iters: int = 20000
    lr: float = 1e-3
    iters_a: int = 5000
    lr_a: float = 4e-4
    p: float = 2.4
    running_stat: bool = False
    rs_sm_only: bool = False
    rounding_weight: float = 0.01
    warmup: float = 0.2
    validation_fraction: float = 0.125
    iters_tune: int = 0
    iters_tune_a: int = 0
    lr_tune: float = 1e-2
    batch_tune: int = 16
    rounding: str = "adaround"
    smoothing: bool = False
    unit_samples: int = 0
    policy_budget: float = 0.0
    seed: int = 0

    def validate(self) -> "CalibrationConfig":
        """Return self.

        Raises:
            ConfigError: a setting that cannot work, by name.
        """
        for name in ("num_timesteps", "samples", "batch_size", "batch_tune"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, name, f" {value}: expected a whole number of at least 1")
        for name in ("iters", "iters_a", "iters_tune", "iters_tune_a", "unit_samples"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 0, name, f" {value}: expected a whole number of 0 or more")
        fraction = self.validation_fraction
        _require(0 < fraction < 1, "validation_fraction", f" {fraction}: expected more than 0 and less than 1")
        _require(0 <= self.warmup <= 1, "warmup", f" {self.warmup}: expected 0 to 1")
        _require(self.rounding in ROUNDINGS, "rounding", f" {self.rounding}: expected {', '.join(ROUNDINGS)}")
        budget = self.policy_budget
        _require(0 <= budget <= 1, "policy_budget", f" {budget}: expected a share of 0 to 1")
        for name in ("lr", "lr_a", "p", "lr_tune"):
            _require(getattr(self, name) > 0, name, f" {getattr(self, name)}: expected a positive number")
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as files hold them."""
        return {FILE_KEYS.get(name, name): value for name, value in asdict(self).items()}


_FAST = CalibrationConfig(
    samples=64,
    iters=0,
    iters_a=0,
    rounding="compensated",
    smoothing=True,
    unit_samples=256,
    policy_budget=0.05,
    batch_tune=8,
)
PRESETS = {
    "published": CalibrationConfig(),
    "fast": _FAST,
    "best": replace(_FAST, samples=128, unit_samples=1024, iters_tune=2500),
}
