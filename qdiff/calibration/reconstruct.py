"""Reconstruction of one unit: AdaRound for its weights and a shift of its bias, then LSQ for its activation step sizes.

BRECQ (arXiv 2102.05426, algorithm 1) with the losses of Q-Diffusion. Inputs come from the quantized
prefix, targets from the full-precision network.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.calibration.batches import add_gradients, in_batches, mean_loss
from qdiff.config import CalibrationConfig
from qdiff.layers import ActQuantizer, QuantLayer, QuantLinear
from qdiff.quantizers import ScaleMethod
from qdiff.utils import distributed

Tick = Callable[[float], None]  # called with the loss after every iteration
HELD_OUT_CHECKS = 20


@dataclass(frozen=True)
class UnitData:
    """Inputs and targets of a unit over all rows; the rows from `held_out_from` on only judge.

    read: from row numbers to (inputs, target) on the device. call: runs the unit on inputs. rows: their number.
    autocast: run the unit in bfloat16 while it is fitted.
    """

    read: Callable[[Tensor | slice], tuple[Sequence[Tensor], Tensor]]
    rows: int
    held_out_from: int
    batch_size: int
    call: Callable[[nn.Module, Sequence[Tensor]], Tensor] = lambda unit, inputs: unit(*inputs)
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def draw(self, generator: torch.Generator) -> Tensor:
        """The numbers of a random batch of the rows that are fitted."""
        return torch.randint(0, self.held_out_from, (self.batch_size,), generator=generator)

    def gradients(self, unit: nn.Module, batch: Tensor, p: float, parameters: list[Tensor]) -> float:
        """Add the gradients of the reconstruction loss over a batch to those of the parameters; return the loss."""

        def loss(part: Tensor) -> Tensor:
            inputs, target = self.read(part)
            with self.autocast():
                output = self.call(unit, inputs)
            return reconstruction_loss(output.float(), target, p)

        return add_gradients(loss, batch, parameters)

    @torch.no_grad()
    def held_out_error(self, unit: nn.Module, p: float) -> float:
        """The reconstruction loss over the held-out rows, in full precision of the simulation."""

        def loss(part: slice) -> Tensor:
            inputs, target = self.read(part)
            return reconstruction_loss(self.call(unit, inputs), target, p)

        return mean_loss(loss, range(self.held_out_from, self.rows), self.batch_size)


def reconstruction_loss(output: Tensor, target: Tensor, p: float) -> Tensor:
    """|output - target|^p, summed over the channels (dimension 1), averaged over the rest."""
    return (output - target).abs().pow(p).sum(1).mean()


@dataclass(frozen=True)
class UnitResult:
    """Held-out reconstruction error of a unit before and after a phase."""

    before: float
    after: float


def reconstruct_weights(
    unit: nn.Module,
    layers: list[QuantLayer],
    data: UnitData,
    method: ScaleMethod,
    config: CalibrationConfig,
    seed: int,
    tick: Tick,
) -> UnitResult:
    """Learn the rounding of the weights of `layers` and fix them as integers.

    The learned rounding is kept only if the held-out rows like it better than nearest rounding.
    """
    weights = [layer.weight for layer in layers]
    for layer in layers:
        layer.init_weight_scales(method)
    nearest = [[q.integers for q in layer.weight_quantizers] for layer in layers]
    before = data.held_out_error(unit, 2.0)
    if config.iters == 0:
        return UnitResult(before, before)
    alphas = _start_rounding(layers, weights)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(alphas, lr=config.lr)
    for step in range(config.iters):
        optimizer.zero_grad()
        loss = data.gradients(unit, data.draw(generator), 2.0, alphas)
        if step >= config.warmup * config.iters:
            beta = Q.beta_schedule(step, config.iters, config.warmup)
            (config.rounding_weight * sum(Q.rounding_regularizer(alpha, beta) for alpha in alphas)).backward()
        optimizer.step()
        tick(loss)
    distributed.from_first(alphas)
    _finish_rounding(layers)
    after = data.held_out_error(unit, 2.0)
    if not after <= before:
        for layer, integers in zip(layers, nearest, strict=True):
            layer.set_integers(integers)
        after = before
    return UnitResult(before, after)


def _start_rounding(layers: list[QuantLayer], weights: list[Tensor]) -> list[Tensor]:
    alphas: list[Tensor] = []
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight, layer.quantized = weight, False
        layer.rounding = [
            Q.init_alpha(part, q.scale).requires_grad_()
            for q, part in zip(layer.weight_quantizers, layer._parts(weight), strict=True)
        ]
        alphas += layer.rounding
    return alphas


@torch.no_grad()
def _finish_rounding(layers: list[QuantLayer]) -> None:
    for layer in layers:
        parts = zip(layer.weight_quantizers, layer._parts(layer.weight), layer.rounding, strict=True)
        layer.set_integers([Q.hard_integers(w, alpha, q.scale, q.zero_point, q.n_bits) for q, w, alpha in parts])


@torch.no_grad()
def correct_bias(unit: nn.Module, layer: QuantLayer, data: UnitData) -> UnitResult:
    """Shift the bias of `layer`, which is added to the output of `unit`, so that the mean error of every channel vanishes.

    Rounding moves the mean of an output, all images alike, and such errors add up along a trajectory
    (Nagel et al. 2019, arXiv 1906.04721, section 4.2). Kept only if the held-out error falls.
    """
    before = data.held_out_error(unit, 2.0)
    if layer.bias is None:
        return UnitResult(before, before)
    channels = -1 if isinstance(layer, QuantLinear) else 1
    total, rows = 0.0, 0

    def work(part: slice) -> None:
        nonlocal total, rows
        inputs, target = data.read(part)
        error = (target - data.call(unit, inputs)).movedim(channels, -1).flatten(0, -2)
        total, rows = total + error.sum(0).cpu().double(), rows + len(error)

    in_batches(work, range(data.held_out_from), data.batch_size)
    kept = layer.bias
    layer.bias = nn.Parameter(kept + (total / max(rows, 1)).to(kept.device, kept.dtype), requires_grad=False)
    distributed.from_first([layer.bias])
    after = data.held_out_error(unit, 2.0)
    if not after <= before:
        layer.bias, after = kept, before
    return UnitResult(before, after)


def reconstruct_activations(
    unit: nn.Module, quantizers: list[ActQuantizer], data: UnitData, config: CalibrationConfig, seed: int, tick: Tick
) -> UnitResult:
    """Learn the step sizes of `quantizers` (LSQ); the best on the held-out rows, the start included, are kept.

    Ends after `patience` checks on those rows in a row without a better one.
    16-bit quantizers (attention probabilities of Stable Diffusion) stay as they are.
    """
    learned = [q for q in quantizers if q.n_bits < 16]
    before = best = data.held_out_error(unit, config.p)
    if not learned or config.iters_a == 0:
        return UnitResult(before, before)
    kept, worse = [q.scale.clone() for q in learned], 0
    for quantizer in learned:
        quantizer.scale = quantizer.scale.clone().requires_grad_()
        quantizer.learning = True
    deltas = [q.scale for q in learned]
    floors = [scale.detach() * 0.01 for scale in deltas]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(deltas, lr=config.lr_a)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters_a, eta_min=0.0)
    for step in range(config.iters_a):
        optimizer.zero_grad()
        loss = data.gradients(unit, data.draw(generator), config.p, deltas)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for scale, floor in zip(deltas, floors, strict=True):
                scale.clamp_(min=floor)
        if (step + 1) % max(1, config.iters_a // HELD_OUT_CHECKS) == 0 or step + 1 == config.iters_a:
            error = data.held_out_error(unit, config.p)
            worse = 0 if error < best else worse + 1
            if error < best:
                best, kept = error, [scale.detach().clone() for scale in deltas]
        tick(loss)
        if config.patience and worse == config.patience:
            break
    distributed.from_first(kept)
    for quantizer, scale in zip(learned, kept, strict=True):
        quantizer.scale, quantizer.learning = scale, False
    return UnitResult(before, best)
