"""What is quantized and how it is calibrated: checked, immutable, and stored in every packed checkpoint."""

import contextlib
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from qdiff.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_names(found: Iterable[str], known: Iterable[str], section: str) -> None:
    """ConfigError, by name, for a key of a YAML file that nothing reads; the nearest known one is offered."""
    known = list(known)
    for name in map(str, found):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(f"section {section}: unknown {name}" + (f" (did you mean {near[0]}?)" if near else ""))


def typed(value: Any, kind: Any, name: str) -> Any:
    """`value` as a setting of type `kind`: int, float, bool, str, None, tuples and unions of them; a list becomes a tuple.

    Raises:
        ConfigError: a value of another type, by name.
    """
    if get_origin(kind) is UnionType:
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(typed(item, get_args(kind)[0], name) for item in value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):  # YAML reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    plain = isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not plain or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{name} {value!r}: expected {getattr(kind, '__name__', kind)}")
    return value


def fill(kind: type, values: dict[str, Any], section: str, ignored: Iterable[str] = ()) -> Any:
    """A dataclass from a section of a YAML file; lists become tuples.

    Args:
        ignored: further keys that the section may have.

    Raises:
        ConfigError: a setting is missing, unknown or of another type, by name.
    """
    _require(isinstance(values, Mapping), f"section {section}: expected settings, found {values!r}")
    known = {field.name: field for field in fields(kind)}
    required = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in required if values.get(name) is None]
    check_names(values, [*known, *ignored], section)
    _require(not missing, f"section {section}: missing {', '.join(missing)}")
    given = {name: value for name, value in values.items() if name in known}
    return kind(**{name: typed(value, known[name].type, f"{section}.{name}") for name, value in given.items()})


@dataclass(frozen=True)
class QuantConfig:
    """The simulated number formats.

    weight_bit, act_bit: 2 to 16; sm_abit: the width of attention probabilities. quant_act: quantize
    activations as well as weights. a_sym: symmetric activations. split: two quantizers for a
    concatenated shortcut. *_scale_method: how the range becomes a step size (`qdiff.quantizers`).
    quant_mode: `qdiff` reconstructs, `linear` rounds to nearest. time_bounds: where each time-step set but the first
    begins (ascending); every set has its own activation step sizes. Empty: one for all time steps.
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

    def validate(self) -> "QuantConfig":
        """Return self, or raise ConfigError naming the option."""
        for name in ("weight_bit", "act_bit", "sm_abit"):
            value = getattr(self, name)
            _require(isinstance(value, int) and 2 <= value <= 16, f"--{name} {value}: expected a width of 2 to 16 bits")
        for name in ("weight_scale_method", "act_scale_method"):
            value = getattr(self, name)
            _require(value in ("max", "max_scale", "mse"), f"{name} {value!r}: expected max, max_scale or mse")
        _require(self.quant_mode in ("qdiff", "linear"), f"--quant_mode {self.quant_mode}: expected qdiff or linear")
        bounds = list(self.time_bounds)
        _require(bounds == sorted(set(bounds)), f"time_bounds {bounds}: expected ascending time steps")
        return self

    def linear(self) -> "QuantConfig":
        """The same widths by nearest rounding and min-max ranges."""
        return replace(self, quant_mode="linear", weight_scale_method="max", act_scale_method="max")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "QuantConfig":
        """Rebuild from `to_dict`; unknown or missing settings are an error (older files have no `time_bounds`)."""
        values = {"time_bounds": ()} | values
        names = {field.name for field in fields(cls)}
        _require(set(values) == names, f"quantization settings {sorted(values)}: expected {sorted(names)}")
        return cls(**values | {"time_bounds": tuple(values["time_bounds"])}).validate()


@dataclass(frozen=True)
class CalibrationConfig:
    """The recipe of reconstruction (Q-Diffusion section 4; BRECQ; AdaRound). Defaults: the published ones (`PRESETS`).

    steps, samples: `--cali_st`, `--cali_n`: time steps used of the calibration set, samples of each.
    iters, lr, iters_a, lr_a, p: iterations and learning rates of rounding and of the activation step
    sizes, the norm of the latter's loss. running_stat: moving averages for the activation ranges
    (rs_sm_only: of attention probabilities only). held_out: fraction of the rows that choose the best
    step sizes and take no part in fitting them. patience: step sizes of a unit are done after so many of the checks
    on those rows (20 in `iters_a`) without a better one; 0: never. iters_tune, lr_tune, batch_tune: of the fit of all step
    sizes, biases and normalizations together to the network's output, after the units. bfloat16: units run in it while they are fitted,
    and activations are kept in it.
    """

    steps: int = 1
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
    held_out: float = 0.125
    patience: int = 0
    iters_tune: int = 0
    lr_tune: float = 1e-2
    batch_tune: int = 16
    bfloat16: bool = False
    seed: int = 0

    def validate(self) -> "CalibrationConfig":
        """Return self, or raise ConfigError naming the option."""
        for name, option in (("steps", "cali_st"), ("samples", "cali_n"), ("batch_size", "cali_batch_size")):
            _require(getattr(self, name) >= 1, f"--{option} {getattr(self, name)}: expected at least 1")
        for name, option in (("iters", "cali_iters"), ("iters_a", "cali_iters_a"), ("iters_tune", "cali_iters_tune")):
            _require(getattr(self, name) >= 0, f"--{option} {getattr(self, name)}: expected 0 or more")
        _require(self.patience >= 0, f"patience {self.patience}: expected 0 or more")
        for name, option in (("lr", "cali_lr_w"), ("lr_a", "cali_lr"), ("p", "cali_p")):
            _require(getattr(self, name) > 0, f"--{option} {getattr(self, name)}: expected a positive number")
        return self

    def to_dict(self) -> dict:
        return asdict(self)


PRESETS = {
    "published": CalibrationConfig(),
    "fast": CalibrationConfig(
        samples=64, iters=400, lr=3e-2, iters_a=60, lr_a=1e-3, patience=5, iters_tune=150, bfloat16=True
    ),
}
