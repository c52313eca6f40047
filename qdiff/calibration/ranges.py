"""Activation ranges: the first scales of all activation quantizers, from samples of all time steps."""

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

    fitting = largest_fitting(lambda chosen: set_ranges(model, data, chosen, method, device), order[:RANGE_SAMPLES])
    if unseen := [path for path, q in act_quantizers(model).items() if not torch.isfinite(q.scale).all()]:
        raise RuntimeError(f"activation quantizers never reached by a forward pass: {', '.join(unseen[:3])}")
    averages: list[_RunningRange] = []
    for quantizer in act_quantizers(model).values():
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


@torch.no_grad()
def set_ranges(model: nn.Module, data: CalibrationData, chosen: Tensor, method: str, device: torch.device) -> None:
    """Set the scale and zero point of every activation quantizer from one pass over some samples.

    Args:
        model: the quantized network. Quantizers that are enabled quantize what the others see.
        data: the samples.
        chosen: numbers of samples, [S].
        method: the scale rule.
        device: where the network is.

    Raises:
        NonFiniteError: an activation that is not finite, by the path of its quantizer.
    """
    ranges = [_Range(path, quantizer, method) for path, quantizer in act_quantizers(model).items()]
    for part in data.uniform_parts(chosen):
        assert isinstance(part, Tensor)  # as `chosen` is
        for observer in ranges:
            observer.share = len(part) / len(chosen)
        data.run(model, part, device)
    for observer in ranges:
        observer.finish()


class _Pool:
    """A fair sample of values that come in several parts, with the least and the greatest of all."""

    def __init__(self) -> None:
        self.values, self.count = torch.empty(0), 0
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Add the values of `x` [K]."""
        self.values = self._joined(x) if self.count else _thin(x, RULE_ELEMENTS)
        self.count += len(x)

    def _joined(self, x: Tensor) -> Tensor:
        old, new = (
            values[torch.randint(0, len(values), (RULE_ELEMENTS,), generator=self.generator).to(x.device)]
            for values in (self.values, x)
        )
        stays = torch.rand(RULE_ELEMENTS, generator=self.generator) < self.count / (self.count + len(x))
        ends = [torch.minimum(self.values.amin(), x.amin()), torch.maximum(self.values.amax(), x.amax())]
        return torch.cat([torch.where(stays.to(x.device), old, new), torch.stack(ends)])

    def add_share(self, x: Tensor, share: float) -> bool:
        """Add the values of `x` [K], which are this share of all; returns whether they lie outside the range so far."""
        part = _thin(x, max(1, int(share * RULE_ELEMENTS)))
        grows = not self.count or bool((part.amin() < self.values.amin()) | (part.amax() > self.values.amax()))
        self.values, self.count = torch.cat([self.values.to(part), part]), self.count + len(x)
        return grows


class _Range:
    """Observes an activation and sets its scale and zero point.

    The activation may come in several parts: slices of a large attention, several calls of a layer, samples of other
    time steps. With timestep groups there is one range for each group; a group without samples gets that of its
    neighbor.

    Args:
        path: what messages call the quantizer.
        quantizer: the quantizer of the activation.
        method: the scale rule.

    Attributes:
        share: the share of the samples that are passed through the network now.
    """

    def __init__(self, path: str, quantizer: ActQuantizer, method: str) -> None:
        self.path, self.quantizer, self.method, self.share = path, quantizer, method, 1.0
        self.pools: dict[int, _Pool] = {}
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        quantizer.observer = self

    def __call__(self, x: Tensor) -> None:
        x, groups = x.detach(), self.quantizer.groups
        if groups is None:
            self._add(0, x)
        else:
            group_of = groups.of_rows(len(x), x.device)
            for number in group_of.unique().tolist():
                self._add(number, x[group_of == number])
        self._set()

    def finish(self) -> None:
        """Stop observing; if samples came in parts, choose the ranges from all of them."""
        if self.share < 1:
            for group in self.pools:
                self._choose(group)
            self._set()
        self.quantizer.observer = None

    def _add(self, group: int, x: Tensor) -> None:
        """Add values of a group. Its range is searched again, unless they come in many parts and lie within it."""
        pool, outside = self.pools.setdefault(group, _Pool()), True
        if self.share < 1:
            outside = pool.add_share(x.flatten(), self.share)
        else:
            pool.add(x.flatten())
        if not torch.isfinite(pool.values).all():  # the least and the greatest of all values are among them
            raise NonFiniteError(f"{self.path}: the network gives values there that are not finite numbers")
        if outside:
            self._choose(group)

    def _choose(self, group: int) -> None:
        self.found[group] = _qparams(self.quantizer, self.pools[group].values, self.method)

    def _set(self) -> None:
        count = len(self.quantizer.groups) if self.quantizer.groups else 0
        if not self.found:
            return
        if not count:
            self.quantizer.set_qparams(*self.found[0])
            return
        nearest = [min((abs(other - number), other) for other in self.found)[1] for number in range(count)]
        scale, zero_point = (torch.stack([self.found[number][i] for number in nearest]) for i in range(2))
        self.quantizer.set_qparams(scale, zero_point)


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


def _thin(x: Tensor, limit: int) -> Tensor:
    """At most `limit` random elements of `x`, with its least and its greatest one."""
    flat = x.flatten()
    if len(flat) <= limit:
        return flat.clone()  # a view would keep the whole activation in memory
    chosen = torch.randint(0, len(flat), (limit,), generator=torch.Generator().manual_seed(0))
    return torch.cat([flat[chosen.to(flat.device)], *(end[None] for end in torch.aminmax(flat))])


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
