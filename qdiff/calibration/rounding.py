"""Error-compensating rounding of the layers of one unit, in the order in which they run."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qdiff.calibration.batches import mean_loss
from qdiff.calibration.blockwise import UnitCall
from qdiff.calibration.cache import CachedTensor
from qdiff.calibration.compensation import can_compensate, expand_channels, gather_moments, round_compensated
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.reconstruct import UnitResult
from qdiff.calibration.smoothing import choose_smoothing
from qdiff.layers import QuantLayer
from qdiff.scale_rules import FITTED_RULE
from qdiff.utils import distributed
from qdiff.utils.memory import halving

RunUnit = Callable[[nn.Module, Tensor | slice], Tensor]  # the output of a unit for some samples


class _ReachedLayer(Exception):
    """The layer has been called as often as it is: the rest of the unit is not needed."""


@dataclass(frozen=True)
class UnitPair:
    """A unit in both networks, and what it takes to run it.

    Attributes:
        full: the unit in the wrapped full-precision network, whose weights are not quantized.
        quantized: the unit in the quantized network.
        run_full: runs `full` on some samples, with inputs from the full-precision network.
        run_quantized: runs `quantized` on some samples, with inputs from the quantized prefix of the network.
        train: indices of the training split.
        validation: indices of the validation split.
        batch_size: samples of one batch.
    """

    full: nn.Module
    quantized: nn.Module
    run_full: RunUnit
    run_quantized: RunUnit
    train: Tensor
    validation: range
    batch_size: int

    @classmethod
    def of(
        cls,
        modules: tuple[nn.Module, nn.Module],
        calls: Sequence[tuple[UnitCall, Sequence[CachedTensor]]],
        data: CalibrationData,
        batch_size: int,
        before_samples: Callable[[Tensor | slice], None],
    ) -> "UnitPair":
        """The unit with cached inputs.

        Args:
            modules: the unit in the full-precision network and in the quantized one.
            calls: how each is called, and its cached inputs.
            data: the samples.
            batch_size: samples of one batch.
            before_samples: called with the samples before a unit runs on them.
        """
        device = next(tensor.device for tensor in [*modules[0].parameters(), *modules[0].buffers()])

        def runner(call: UnitCall, arguments: Sequence[CachedTensor]) -> RunUnit:
            def run(unit: nn.Module, index: Tensor | slice) -> Tensor:
                before_samples(index)
                return call(unit, [x.read(index, device) for x in arguments])

            return run

        train = torch.arange(len(data.train))
        return cls(*modules, runner(*calls[0]), runner(*calls[1]), train, data.validation, batch_size)

    def inputs(self, path: str, calls: int, which: int, batch: Tensor) -> list[Tensor]:
        """The inputs of a layer of the unit in all its calls, for some samples.

        Args:
            path: the layer's path in the unit.
            calls: how often it is called.
            which: 0 for the full-precision network, 1 for the quantized one.
            batch: the samples.
        """
        unit, run = (self.quantized, self.run_quantized) if which else (self.full, self.run_full)
        seen: list[Tensor] = []

        def work(part: Tensor) -> None:
            found: list[Tensor] = []
            with _recorded(unit.get_submodule(path), found, calls), suppress(_ReachedLayer):
                run(unit, part)
            seen.extend(found)

        halving(work, batch)
        return seen

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The squared error of the quantized unit relative to the output's square, over the validation split."""

        def loss(part: slice) -> Tensor:
            target = self.run_full(self.full, part).float().flatten(1)
            error = self.run_quantized(self.quantized, part).float().flatten(1) - target
            largest = target.abs().amax(1, keepdim=True)  # squares of large values leave the range of float32
            largest = torch.where(largest > 0, largest, torch.ones_like(largest))
            return ((error / largest).square().sum(1) / (target / largest).square().sum(1).clamp(min=1e-12)).mean()

        return mean_loss(loss, self.validation, self.batch_size)


@contextmanager
def _recorded(layer: nn.Module, seen: list[Tensor], calls: int) -> Iterator[None]:
    """Collect the inputs of a layer, and end the pass at the last of its calls."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())
        if len(seen) == calls:
            raise _ReachedLayer

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def count_calls(pair: UnitPair, layers: Sequence[tuple[str, QuantLayer]]) -> dict[str, int]:
    """How often each layer of a unit that is called at all is called, by path, in the order of the first calls."""
    counts: Counter[str] = Counter()
    handles = [
        layer.register_forward_pre_hook(lambda _, __, path=path: counts.update([path])) for path, layer in layers
    ]
    try:
        pair.run_quantized(pair.quantized, pair.train[:1])
    finally:
        for handle in handles:
            handle.remove()
    return dict(counts)


@torch.no_grad()
def compensate_unit(pair: UnitPair, layers: Sequence[tuple[str, QuantLayer]], smooth: bool, seed: int) -> UnitResult:
    """Smooth, round and fix the weights of the layers of a unit.

    If the unit comes out worse than with nearest rounding, it keeps nearest rounding and its biases.

    Args:
        pair: the unit in both networks.
        layers: its quantized layers with their paths in it.
        smooth: choose smoothing for each layer (it serves quantized activations).
        seed: seed of the choice of rows.

    Returns:
        The relative validation loss of nearest rounding, and what was reached.
    """
    weights = [(layer, layer.weight, layer.bias) for _, layer in layers]
    before = _nearest_loss(pair, weights)
    batches, by_path = list(pair.train.split(pair.batch_size)), dict(layers)
    for path, calls in count_calls(pair, layers).items():
        layer = by_path[path]
        if not can_compensate(layer):
            continue
        full = pair.full.get_submodule(path)
        assert isinstance(full, QuantLayer)  # both networks are wrapped alike
        inputs = partial(pair.inputs, path, calls)
        moments, rows = gather_moments((full, layer), inputs, batches, seed)
        _set_full_precision(layer, full.weight)
        if smooth and choose_smoothing(layer, rows):
            assert layer.smoothing is not None  # chosen just now
            moments.smooth(expand_channels(layer, layer.smoothing))
        round_compensated(layer, moments)
    after = pair.validation_loss()
    if not after <= before:
        after = before
        for layer, weight, bias in weights:
            layer.bias = bias
            _round_nearest(layer, weight)
    for layer, _, _ in weights:
        distributed.from_first([q.integers for q in layer.weight_quantizers])
    return UnitResult(before, after)


def _nearest_loss(pair: UnitPair, weights: Sequence[tuple[QuantLayer, Tensor, Tensor | None]]) -> float:
    for layer, weight, _ in weights:
        _round_nearest(layer, weight)
    return pair.validation_loss()


def _set_full_precision(layer: QuantLayer, weight: Tensor) -> None:
    layer.smoothing, layer.quantized, layer.weight = None, False, weight


def _round_nearest(layer: QuantLayer, weight: Tensor) -> None:
    """Round the weight of a layer to nearest, without smoothing."""
    _set_full_precision(layer, weight)
    layer.init_weight_scales(FITTED_RULE)
