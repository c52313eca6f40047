"""Activation ranges: from rows of all time steps, in shuffled order."""

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.calibration.dataset import Rows
from qdiff.config import CalibrationConfig, ConfigError, QuantConfig
from qdiff.layers import ActQuantizer
from qdiff.model import act_quantizers, enable_activations

RANGE_ROWS = 256  # rows, drawn from all time steps, that the first ranges come from
STAT_BATCH = 64
SEARCH_ELEMENTS = 2**18  # of one activation, that the `mse` search looks at; the range itself is that of all


@torch.no_grad()
def init_activation_ranges(model: nn.Module, rows: Rows, quant: QuantConfig, config: CalibrationConfig, device: torch.device) -> None:
    """Set the step size and zero point of every activation quantizer, in order of execution.

    Each range is found on inputs that the quantizers before it have already quantized. With
    `running_stat`, moving averages over shuffled batches of all rows follow (attention probabilities
    only, with `rs_sm_only`); not with time-step sets. Afterwards all quantizers are on.
    """
    enable_activations(model, True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    for quantizer in act_quantizers(model).values():
        first = _FirstRangeOfEachSet if quantizer.steps else _FirstRange
        quantizer.observer = first(quantizer, quant.act_scale_method)
    model(*(part.to(device) for part in rows[order[:RANGE_ROWS]]))
    if unseen := [name for name, q in act_quantizers(model).items() if not torch.isfinite(q.delta).all()]:
        raise RuntimeError(f"activation quantizers never reached by a forward pass: {', '.join(unseen[:3])}")
    for quantizer in act_quantizers(model).values():
        averaged = config.running_stat and not quantizer.steps and (quantizer.is_softmax or not config.rs_sm_only)
        quantizer.observer = _RunningRange(quantizer) if averaged else None
    if config.running_stat:
        for start in range(0, len(order), STAT_BATCH):
            model(*(part.to(device) for part in rows[order[start : start + STAT_BATCH]]))
    for quantizer in act_quantizers(model).values():
        quantizer.observer = None


class _FirstRange:
    def __init__(self, quantizer: ActQuantizer, method: Q.ScaleMethod) -> None:
        self.quantizer, self.method = quantizer, method

    def __call__(self, x: Tensor) -> None:
        q = self.quantizer
        if self.method == "mse":
            x = _thin(x)
        q.set_scale(*Q.find_scale(x, q.n_bits, symmetric=q.symmetric, method=self.method, always_zero=q.always_zero))


class _FirstRangeOfEachSet:
    """One range for each time-step set; a set without rows gets that of its neighbor."""

    def __init__(self, quantizer: ActQuantizer, method: Q.ScaleMethod) -> None:
        self.quantizer, self.method = quantizer, method

    def __call__(self, x: Tensor) -> None:
        q = self.quantizer
        sets = q.steps.of_rows(len(x), x.device)
        found = {}
        for number in sets.unique().tolist():
            part = x[sets == number]
            part = _thin(part) if self.method == "mse" else part
            found[number] = Q.find_scale(part, q.n_bits, symmetric=q.symmetric, method=self.method, always_zero=q.always_zero)
        nearest = [min(found, key=lambda other, number=number: abs(other - number)) for number in range(len(q.steps))]
        q.set_scale(*(torch.stack([found[number][i] for number in nearest]) for i in range(2)))


def _thin(x: Tensor) -> Tensor:
    """At most SEARCH_ELEMENTS random elements of `x`, with its least and greatest."""
    flat = x.flatten()
    if len(flat) <= SEARCH_ELEMENTS:
        return flat
    chosen = torch.randint(0, len(flat), (SEARCH_ELEMENTS,), generator=torch.Generator().manual_seed(0))
    return torch.cat([flat[chosen.to(flat.device)], flat.amin()[None], flat.amax()[None]])


class _RunningRange:
    def __init__(self, quantizer: ActQuantizer) -> None:
        self.quantizer = quantizer
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        self.low, self.high = Q.running_range(self.low, self.high, x)
        q = self.quantizer
        q.set_scale(*Q.scale_from_range(self.low, self.high, q.n_bits, q.symmetric, q.always_zero))


def time_bounds(rows: Rows, sets: int) -> tuple[float, ...]:
    """Where each of `sets` time-step sets but the first begins, for equally many of the time steps in `rows` in each.

    Raises:
        ConfigError: more sets than time steps.
    """
    times = rows.inputs[1].unique().tolist()
    if sets > len(times):
        raise ConfigError(f"--time_sets {sets}: the calibration set has {len(times)} time steps")
    firsts = [len(times) * number // sets for number in range(1, sets)]
    return tuple((times[first - 1] + times[first]) / 2 for first in firsts)
