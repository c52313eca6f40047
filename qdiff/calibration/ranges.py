"""Activation ranges: from rows of all time steps, in shuffled order."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.calibration.data import CalibrationData
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.layers import ActQuantizer
from qdiff.model import act_quantizers, enable_activations
from qdiff.utils.memory import largest_fitting

RANGE_ROWS = 256  # rows, drawn from all time steps, that the first ranges come from
STAT_BATCH = 64
SEARCH_ELEMENTS = 2**18  # of one activation, that the `mse` search looks at; the range itself is that of all


@torch.no_grad()
def init_activation_ranges(
    model: nn.Module, rows: CalibrationData, quant: QuantConfig, config: CalibrationConfig, device: torch.device
) -> None:
    """Set the step size and zero point of every activation quantizer, in order of execution.

    Each range is found on inputs that the quantizers before it have already quantized. With
    `running_stat`, moving averages over shuffled batches of all rows follow (attention probabilities
    only, with `rs_sm_only`); not with time-step sets. Afterwards all quantizers are on. Where memory does not suffice for
    RANGE_ROWS in one pass, fewer are taken.
    """
    enable_activations(model, True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))

    def first_ranges(chosen: Tensor) -> None:
        for name, quantizer in act_quantizers(model).items():
            first = _FirstRangeOfEachSet if quantizer.groups else _FirstRange
            quantizer.observer = _finite(name, first(quantizer, quant.act_scale_method))
        model(*(part.to(device) for part in rows[chosen]))

    fitting = largest_fitting(first_ranges, order[:RANGE_ROWS])
    if unseen := [name for name, q in act_quantizers(model).items() if not torch.isfinite(q.scale).all()]:
        raise RuntimeError(f"activation quantizers never reached by a forward pass: {', '.join(unseen[:3])}")
    for quantizer in act_quantizers(model).values():
        averaged = config.running_stat and not quantizer.groups and (quantizer.is_softmax or not config.rs_sm_only)
        quantizer.observer = _RunningRange(quantizer) if averaged else None
    if config.running_stat:
        for part in order.split(min(STAT_BATCH, fitting)):
            for quantizer in act_quantizers(model).values():
                if quantizer.observer is not None:
                    quantizer.observer.begin()
            model(*(tensor.to(device) for tensor in rows[part]))
    for quantizer in act_quantizers(model).values():
        quantizer.observer = None


def _finite(name: str, observer: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """`observer`, but for values that are not finite numbers: they are an error that names the quantizer."""

    def observe(x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise NonFiniteError(f"{name}: the network gives values there that are not finite numbers")
        observer(x)

    return observe


class _FirstRange:
    """The range of all that one forward pass shows: large attentions come in slices, each of which widens the last one's."""

    def __init__(self, quantizer: ActQuantizer, method: Q.ScaleMethod) -> None:
        self.quantizer, self.method = quantizer, method
        self.seen, self.count = torch.empty(0), 0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> None:
        q = self.quantizer
        self.seen = self._with(x.detach().flatten())
        self.count += x.numel()
        q.set_qparams(
            *Q.choose_qparams(
                self.seen, q.n_bits, symmetric=q.symmetric, method=self.method, always_zero=q.always_zero, name=q.name
            )
        )

    def _with(self, x: Tensor) -> Tensor:
        """What stands for all values so far and `x`: their least and greatest, for the `mse` search with a fair sample."""
        if self.method != "mse":
            ends = [x.amin(), x.amax(), *self.seen]
            return torch.stack([torch.stack(ends).amin(), torch.stack(ends).amax()])
        if not self.count:
            return _thin(x)
        old, new = (
            values[torch.randint(0, len(values), (SEARCH_ELEMENTS,), generator=self.generator).to(x.device)]
            for values in (self.seen, x)
        )
        stays = torch.rand(SEARCH_ELEMENTS, generator=self.generator) < self.count / (self.count + x.numel())
        ends = torch.stack([torch.minimum(self.seen.amin(), x.amin()), torch.maximum(self.seen.amax(), x.amax())])
        return torch.cat([torch.where(stays.to(x.device), old, new), ends])


class _FirstRangeOfEachSet:
    """One range for each time-step set; a set without rows gets that of its neighbor."""

    def __init__(self, quantizer: ActQuantizer, method: Q.ScaleMethod) -> None:
        self.quantizer, self.method = quantizer, method

    def __call__(self, x: Tensor) -> None:
        q = self.quantizer
        sets = q.groups.of_rows(len(x), x.device)
        found = {}
        for number in sets.unique().tolist():
            part = x[sets == number]
            part = _thin(part) if self.method == "mse" else part
            found[number] = Q.choose_qparams(
                part, q.n_bits, symmetric=q.symmetric, method=self.method, always_zero=q.always_zero, name=q.name
            )
        nearest = [min(found, key=lambda other, number=number: abs(other - number)) for number in range(len(q.groups))]
        q.set_qparams(*(torch.stack([found[number][i] for number in nearest]) for i in range(2)))


def _thin(x: Tensor) -> Tensor:
    """At most SEARCH_ELEMENTS random elements of `x`, with its least and greatest."""
    flat = x.flatten()
    if len(flat) <= SEARCH_ELEMENTS:
        return flat
    chosen = torch.randint(0, len(flat), (SEARCH_ELEMENTS,), generator=torch.Generator().manual_seed(0))
    return torch.cat([flat[chosen.to(flat.device)], flat.amin()[None], flat.amax()[None]])


class _RunningRange:
    """A moving average of the ranges of forward passes; within one, slices of an attention count together."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        self.quantizer = quantizer
        self.average: tuple[Tensor | None, Tensor | None] = (None, None)
        self.begin()

    def begin(self) -> None:
        """The next forward pass begins."""
        self.before, self.ends = self.average, []

    def __call__(self, x: Tensor) -> None:
        self.ends += [x.detach().amin(), x.detach().amax()]
        low, high = self.average = Q.running_range(*self.before, torch.stack(self.ends))
        q = self.quantizer
        q.set_qparams(*Q.qparams_from_range(low, high, q.n_bits, q.symmetric, q.always_zero, name=q.name))


def timestep_group_bounds(rows: CalibrationData, sets: int) -> tuple[float, ...]:
    """Where each of `sets` time-step sets but the first begins, for equally many of the time steps in `rows` in each.

    Raises:
        ConfigError: more sets than time steps.
    """
    times = rows.inputs[1].unique().tolist()
    if sets > len(times):
        raise ConfigError(f"--timestep_groups {sets}: the calibration set has {len(times)} time steps")
    firsts = [len(times) * number // sets for number in range(1, sets)]
    return tuple((times[first - 1] + times[first]) / 2 for first in firsts)
