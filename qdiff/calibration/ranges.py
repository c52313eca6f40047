"""Activation ranges: the first scales of all activation quantizers, from samples of all time steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.calibration.data import CalibrationData
from qdiff.config import CalibrationConfig
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.layers import ActQuantizer
from qdiff.model import act_quantizers, enable_activations
from qdiff.quantizers import qparams_from_range, running_range
from qdiff.scale_rules import choose_qparams
from qdiff.utils.memory import largest_fitting

RANGE_SAMPLES = 256  # samples, drawn from all time steps, that the first ranges come from
STAT_BATCH = 64  # samples of one batch of moving averages
RULE_ELEMENTS = 2**18  # values of one activation that a scale rule sees, beside its least and its greatest value


@torch.no_grad()
def init_activation_ranges(
    model: nn.Module, data: CalibrationData, method: str, config: CalibrationConfig, device: torch.device
) -> None:
    """Set the scale and zero point of every activation quantizer, in order of execution.

    Each range is found on inputs that the quantizers before it have already quantized. With `running_stat`, moving
    averages over shuffled batches of all samples follow (of attention probabilities only, with `rs_sm_only`), but not
    with timestep groups. Afterwards all quantizers are on. If memory does not suffice for RANGE_SAMPLES in one pass,
    fewer are taken.

    Args:
        model: the quantized network; changed in place.
        data: the samples.
        method: the scale rule of activations.
        config: the recipe.
        device: where the network is.

    Raises:
        RuntimeError: a quantizer that no forward pass reaches, by path.
        NonFiniteError: an activation that is not finite, by the path of its quantizer.
    """
    enable_activations(model, True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))

    def first_ranges(chosen: Tensor) -> None:
        for path, quantizer in act_quantizers(model).items():
            quantizer.observer = _finite(path, _Range(quantizer, method))
        data.run(model, chosen, device)

    fitting = largest_fitting(first_ranges, order[:RANGE_SAMPLES])
    if unseen := [path for path, q in act_quantizers(model).items() if not torch.isfinite(q.scale).all()]:
        raise RuntimeError(f"activation quantizers never reached by a forward pass: {', '.join(unseen[:3])}")
    averages: list[_RunningRange] = []
    for quantizer in act_quantizers(model).values():
        quantizer.observer = None
        if config.running_stat and not quantizer.groups and (quantizer.is_softmax or not config.rs_sm_only):
            quantizer.observer = _RunningRange(quantizer)
            averages.append(quantizer.observer)
    if config.running_stat:
        for batch in order.split(min(STAT_BATCH, fitting)):
            for average in averages:
                average.begin()
            data.run(model, batch, device)
    for quantizer in act_quantizers(model).values():
        quantizer.observer = None


def _finite(path: str, observer: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """`observer`, which raises NonFiniteError for values that are not finite and names the quantizer."""

    def observe(x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise NonFiniteError(f"{path}: the network gives values there that are not finite numbers")
        observer(x)

    return observe


class _Pool:
    """A fair sample of values that come in several parts, with the least and the greatest of all."""

    def __init__(self) -> None:
        self.values, self.count = torch.empty(0), 0
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> Tensor:
        """Add the values of `x` [K]; returns the sample."""
        self.values = self._joined(x) if self.count else _thin(x)
        self.count += len(x)
        return self.values

    def _joined(self, x: Tensor) -> Tensor:
        old, new = (
            values[torch.randint(0, len(values), (RULE_ELEMENTS,), generator=self.generator).to(x.device)]
            for values in (self.values, x)
        )
        stays = torch.rand(RULE_ELEMENTS, generator=self.generator) < self.count / (self.count + len(x))
        ends = [torch.minimum(self.values.amin(), x.amin()), torch.maximum(self.values.amax(), x.amax())]
        return torch.cat([torch.where(stays.to(x.device), old, new), torch.stack(ends)])


class _Range:
    """Observes an activation, which may come in several parts: slices of a large attention, several calls of a layer.

    With timestep groups it finds one range for each group; a group without samples gets that of its neighbor.
    """

    def __init__(self, quantizer: ActQuantizer, method: str) -> None:
        self.quantizer, self.method = quantizer, method
        self.pools: dict[int, _Pool] = {}
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> None:
        x, groups = x.detach(), self.quantizer.groups
        if groups is None:
            self._add(0, x)
            self.quantizer.set_qparams(*self.found[0])
            return
        group_of = groups.of_rows(len(x), x.device)
        for number in group_of.unique().tolist():
            self._add(number, x[group_of == number])
        nearest = [min((abs(other - number), other) for other in self.found)[1] for number in range(len(groups))]
        scale, zero_point = (torch.stack([self.found[number][i] for number in nearest]) for i in range(2))
        self.quantizer.set_qparams(scale, zero_point)

    def _add(self, group: int, x: Tensor) -> None:
        values = self.pools.setdefault(group, _Pool()).add(x.flatten())
        self.found[group] = _qparams(self.quantizer, values, self.method)


def _qparams(quantizer: ActQuantizer, values: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """What the scale rule `method` chooses for `quantizer`."""
    return choose_qparams(
        values,
        quantizer.n_bits,
        symmetric=quantizer.symmetric,
        method=method,
        always_zero=quantizer.always_zero,
        name=quantizer.name,
    )


def _thin(x: Tensor) -> Tensor:
    """At most RULE_ELEMENTS random elements of `x`, with its least and its greatest one."""
    flat = x.flatten()
    if len(flat) <= RULE_ELEMENTS:
        return flat.clone()  # a view would keep the whole activation in memory
    chosen = torch.randint(0, len(flat), (RULE_ELEMENTS,), generator=torch.Generator().manual_seed(0))
    return torch.cat([flat[chosen.to(flat.device)], flat.amin()[None], flat.amax()[None]])


class _RunningRange:
    """A moving average of the ranges of forward passes; within one pass, slices of an attention count together."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        self.quantizer = quantizer
        self.average: tuple[Tensor | None, Tensor | None] = (None, None)
        self.begin()

    def begin(self) -> None:
        """The next forward pass begins."""
        self.before = self.average
        self.ends: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        self.ends += [x.detach().amin(), x.detach().amax()]
        low, high = running_range(*self.before, torch.stack(self.ends))
        self.average = low, high
        q = self.quantizer
        q.set_qparams(*qparams_from_range(low, high, q.n_bits, q.symmetric, q.always_zero, name=q.name))


def timestep_group_bounds(data: CalibrationData, groups: int) -> tuple[float, ...]:
    """Where each timestep group but the first begins, if all groups hold equally many of the time steps in `data`.

    Raises:
        ConfigError: more groups than time steps, or no time steps.
    """
    if data.spec.time is None:
        message = f" {groups}: expected the time steps as the second input, or by keyword"
        raise ConfigError(message, field="timestep_groups")
    times = data.timesteps(slice(None)).unique().tolist()
    if groups > len(times):
        message = f" {groups}: the calibration set has {len(times)} time steps"
        raise ConfigError(message, field="timestep_groups")
    firsts = [len(times) * number // groups for number in range(1, groups)]
    return tuple((times[first - 1] + times[first]) / 2 for first in firsts)
