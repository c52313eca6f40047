"""Reconstruction of one unit: AdaRound for its weights and a shift of its bias, then LSQ for its activation step sizes.

BRECQ (arXiv 2102.05426, algorithm 1) with the losses of Q-Diffusion. Inputs come from the quantized
prefix, targets from the full-precision network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.config import CalibrationConfig
from qdiff.layers import ActQuantizer, QuantLayer, QuantLinear
from qdiff.quantizers import ScaleMethod

Tick = Callable[[], None]
HELD_OUT_CHECKS = 20


@dataclass(frozen=True)
class UnitData:
    """Inputs and targets of a unit on the CPU; the rows from `held_out_from` on only judge."""

    inputs: tuple[Tensor, ...]
    target: Tensor
    device: torch.device
    batch_size: int
    held_out_from: int

    def draw(self, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        """A random batch of the rows that are fitted."""
        return self._at(torch.randint(0, self.held_out_from, (self.batch_size,), generator=generator))

    def _at(self, index: Tensor | slice) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(x[index].to(self.device) for x in self.inputs), self.target[index].to(self.device)

    @torch.no_grad()
    def held_out_error(self, unit: nn.Module, p: float) -> float:
        """The reconstruction loss over the held-out rows."""
        total, rows = 0.0, len(self.target) - self.held_out_from
        for start in range(self.held_out_from, len(self.target), self.batch_size):
            inputs, target = self._at(slice(start, start + self.batch_size))
            total += reconstruction_loss(unit(*inputs), target, p).item() * len(target)
        return total / rows


def reconstruction_loss(output: Tensor, target: Tensor, p: float) -> Tensor:
    """|output - target|^p, summed over the channels (dimension 1), averaged over the rest."""
    return (output - target).abs().pow(p).sum(1).mean()


@dataclass(frozen=True)
class UnitResult:
    """Held-out reconstruction error of a unit before and after a phase."""

    before: float
    after: float


def reconstruct_weights(
    unit: nn.Module, layers: list[QuantLayer], data: UnitData, method: ScaleMethod, config: CalibrationConfig, seed: int, tick: Tick
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
        inputs, target = data.draw(generator)
        loss = reconstruction_loss(unit(*inputs), target, 2.0)
        if step >= config.warmup * config.iters:
            beta = Q.beta_schedule(step, config.iters, config.warmup)
            loss = loss + config.rounding_weight * sum(Q.rounding_regularizer(alpha, beta) for alpha in alphas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick()
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
            Q.init_alpha(part, q.delta).requires_grad_() for q, part in zip(layer.weight_quantizers, layer._parts(weight), strict=True)
        ]
        alphas += layer.rounding
    return alphas


@torch.no_grad()
def _finish_rounding(layers: list[QuantLayer]) -> None:
    for layer in layers:
        parts = zip(layer.weight_quantizers, layer._parts(layer.weight), layer.rounding, strict=True)
        layer.set_integers([Q.hard_integers(w, alpha, q.delta, q.zero_point, q.n_bits) for q, w, alpha in parts])


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
    for start in range(0, data.held_out_from, data.batch_size):
        inputs, target = data._at(slice(start, min(start + data.batch_size, data.held_out_from)))
        error = (target - unit(*inputs)).movedim(channels, -1).flatten(0, -2)
        total, rows = total + error.sum(0, dtype=torch.float64), rows + len(error)
    kept = layer.bias
    layer.bias = nn.Parameter(kept + (total / max(rows, 1)).to(kept), requires_grad=False)
    after = data.held_out_error(unit, 2.0)
    if not after <= before:
        layer.bias, after = kept, before
    return UnitResult(before, after)


def reconstruct_activations(
    unit: nn.Module, quantizers: list[ActQuantizer], data: UnitData, config: CalibrationConfig, seed: int, tick: Tick
) -> UnitResult:
    """Learn the step sizes of `quantizers` (LSQ); the best on the held-out rows, the start included, are kept.

    16-bit quantizers (attention probabilities of Stable Diffusion) stay as they are.
    """
    learned = [q for q in quantizers if q.n_bits < 16]
    before = best = data.held_out_error(unit, config.p)
    if not learned or config.iters_a == 0:
        return UnitResult(before, before)
    kept = [q.delta.clone() for q in learned]
    for quantizer in learned:
        quantizer.delta = quantizer.delta.clone().requires_grad_()
        quantizer.learning = True
    deltas = [q.delta for q in learned]
    floors = [delta.detach() * 0.01 for delta in deltas]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(deltas, lr=config.lr_a)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters_a, eta_min=0.0)
    for step in range(config.iters_a):
        inputs, target = data.draw(generator)
        loss = reconstruction_loss(unit(*inputs), target, config.p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for delta, floor in zip(deltas, floors, strict=True):
                delta.clamp_(min=floor)
        if (step + 1) % max(1, config.iters_a // HELD_OUT_CHECKS) == 0 or step + 1 == config.iters_a:
            error = data.held_out_error(unit, config.p)
            if error < best:
                best, kept = error, [delta.detach().clone() for delta in deltas]
        tick()
    for quantizer, delta in zip(learned, kept, strict=True):
        quantizer.delta, quantizer.learning = delta, False
    return UnitResult(before, best)
