"""Reconstruction of one unit: AdaRound for its weights and a shift of its bias, then LSQ for its activation scales.

BRECQ (arXiv 2102.05426, algorithm 1) with the losses of Q-Diffusion. Inputs come from the quantized prefix of the
network, targets from the full-precision network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.calibration.batches import add_gradients, in_batches, mean_loss
from qdiff.config import CalibrationConfig
from qdiff.layers import ActQuantizer, QuantLayer, QuantLinear
from qdiff.utils import distributed
from qdiff.utils.memory import Fitting

OnIteration = Callable[[Tensor | float], None]  # called after every iteration with the loss, which it need not read
VALIDATIONS = 20  # of the activation scales of a unit, spread evenly over the iterations


@dataclass(frozen=True)
class UnitData:
    """Inputs and targets of a unit over all samples.

    Attributes:
        read: from sample indices to (inputs, target) on the device.
        train: the indices of the training split.
        validation: the indices of the validation split, which are never trained on.
        batch_size: samples of one batch.
        call: runs the unit on inputs.
        fitting, fitting_forward: the batches that fit into memory, with gradients and without.
    """

    read: Callable[[Tensor | slice], tuple[Sequence[Tensor], Tensor]]
    train: range
    validation: range
    batch_size: int
    call: Callable[[nn.Module, Sequence[Tensor]], Tensor] = lambda unit, inputs: unit(*inputs)
    fitting: Fitting = field(default_factory=Fitting)
    fitting_forward: Fitting = field(default_factory=Fitting)

    def random_batch(self, generator: torch.Generator) -> Tensor:
        """The indices of a random batch of the training split, [batch_size]."""
        return torch.randint(self.train.start, self.train.stop, (self.batch_size,), generator=generator)

    def add_gradients(self, unit: nn.Module, batch: Tensor, p: float, parameters: Sequence[Tensor]) -> Tensor:
        """Add the gradients of the reconstruction loss over a batch to those of the parameters; return the loss."""

        def loss(part: Tensor) -> Tensor:
            inputs, target = self.read(part)
            return reconstruction_loss(self.call(unit, inputs).float(), target, p)

        return add_gradients(loss, batch, parameters, self.fitting)

    @torch.no_grad()
    def validation_loss(self, unit: nn.Module, p: float) -> float:
        """The reconstruction loss over the validation split."""

        def loss(part: slice) -> Tensor:
            inputs, target = self.read(part)
            return reconstruction_loss(self.call(unit, inputs), target, p)

        return mean_loss(loss, self.validation, self.batch_size, self.fitting_forward)


def reconstruction_loss(output: Tensor, target: Tensor, p: float) -> Tensor:
    """|output - target|^p, summed over dimension 1 and averaged over the others.

    Dimension 1 holds the channels of [N, C, H, W] and the tokens of [N, L, C]. There the loss is L / C times a sum
    over channels, which weighs it differently against the rounding regularizer and changes nothing else.
    """
    return (output - target).abs().pow(p).sum(1).mean()


@dataclass(frozen=True)
class UnitResult:
    """The loss of a unit on the validation split, before and after a phase."""

    before: float
    after: float


def reconstruct_weights(
    unit: nn.Module,
    layers: Sequence[QuantLayer],
    data: UnitData,
    method: str,
    config: CalibrationConfig,
    seed: int,
    on_iteration: OnIteration,
) -> UnitResult:
    """Learn the rounding of the weights of `layers` (AdaRound, arXiv 2004.10568) and fix them as integers.

    The learned rounding replaces nearest rounding only if its validation loss is not larger.

    Args:
        unit: the module that is reconstructed.
        layers: the quantized layers inside it that belong to it.
        data: its inputs and targets.
        method: the scale rule of the weights.
        config: the recipe.
        seed: seed of the batches.
        on_iteration: called with the loss after every iteration.
    """
    weights = [layer.weight for layer in layers]
    for layer in layers:
        layer.init_weight_scales(method)
    nearest = [[q.integers for q in layer.weight_quantizers] for layer in layers]
    before = data.validation_loss(unit, 2.0)
    if config.iters == 0:
        return UnitResult(before, before)
    alphas = _start_rounding(layers, weights)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(alphas, lr=config.lr)
    for iteration in range(config.iters):
        optimizer.zero_grad()
        loss = data.add_gradients(unit, data.random_batch(generator), 2.0, alphas)
        if iteration >= config.warmup * config.iters:
            beta = Q.beta_schedule(iteration, config.iters, config.warmup)
            regularizer = sum((Q.rounding_regularizer(alpha, beta) for alpha in alphas), torch.zeros(()))
            (config.rounding_weight * regularizer).backward()
        optimizer.step()
        on_iteration(loss)
    distributed.from_first(alphas)
    _finish_rounding(layers)
    after = data.validation_loss(unit, 2.0)
    if not after <= before:
        for layer, integers in zip(layers, nearest, strict=True):
            layer.set_integers(integers)
        after = before
    return UnitResult(before, after)


def _start_rounding(layers: Sequence[QuantLayer], weights: list[Tensor]) -> list[Tensor]:
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
def _finish_rounding(layers: Sequence[QuantLayer]) -> None:
    for layer in layers:
        assert layer.rounding is not None  # set by _start_rounding
        parts = zip(layer.weight_quantizers, layer._parts(layer.weight), layer.rounding, strict=True)
        layer.set_integers([Q.hard_integers(w, alpha, q.scale, q.zero_point, q.n_bits) for q, w, alpha in parts])


@torch.no_grad()
def correct_bias(unit: nn.Module, layer: nn.Module, data: UnitData) -> UnitResult:
    """Shift the bias of `layer`, which is added to the output of `unit`, so that every channel's mean error vanishes.

    Rounding moves the mean of an output for all images alike, and such errors add up along a trajectory (Nagel et al.
    2019, arXiv 1906.04721, section 4.2). The shift stays only if it does not raise the validation loss.
    """
    before = data.validation_loss(unit, 2.0)
    bias = layer.bias
    if not isinstance(bias, Tensor):
        return UnitResult(before, before)
    channels = -1 if isinstance(layer, QuantLinear) else 1
    total, count = torch.zeros(()), 0

    def work(part: slice) -> None:
        nonlocal total, count
        inputs, target = data.read(part)
        error = (target - data.call(unit, inputs)).movedim(channels, -1).flatten(0, -2)
        total, count = total + error.sum(0).cpu().double(), count + len(error)

    in_batches(work, data.train, data.batch_size, data.fitting_forward)
    if total.shape != bias.shape:  # several outputs, or calls of several shapes, are compared as one row of numbers
        return UnitResult(before, before)
    shifted = nn.Parameter(bias + (total / max(count, 1)).to(bias.device, bias.dtype), requires_grad=False)
    layer.bias = shifted
    distributed.from_first([shifted])
    after = data.validation_loss(unit, 2.0)
    if not after <= before:
        layer.bias, after = bias, before
    return UnitResult(before, after)


def reconstruct_activations(
    unit: nn.Module,
    quantizers: Sequence[ActQuantizer],
    data: UnitData,
    config: CalibrationConfig,
    seed: int,
    on_iteration: OnIteration,
) -> UnitResult:
    """Learn the scales of `quantizers` (LSQ, arXiv 1902.08153).

    The scales with the least validation loss stay, the first ones included. 16-bit quantizers (attention probabilities
    of Stable Diffusion) stay as they are.

    Args:
        unit: the module that is reconstructed.
        quantizers: the activation quantizers that belong to it.
        data: its inputs and targets.
        config: the recipe.
        seed: seed of the batches.
        on_iteration: called with the loss after every iteration.
    """
    learned = [q for q in quantizers if q.n_bits < 16]
    before = best = data.validation_loss(unit, config.p)
    if not learned or config.iters_a == 0:
        return UnitResult(before, before)
    kept = [q.scale.clone() for q in learned]
    for quantizer in learned:
        quantizer.scale = quantizer.scale.clone().requires_grad_()
        quantizer.learning = True
    scales = [q.scale for q in learned]
    floors = [scale.detach() * 0.01 for scale in scales]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(scales, lr=config.lr_a)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters_a, eta_min=0.0)
    for iteration in range(config.iters_a):
        optimizer.zero_grad()
        loss = data.add_gradients(unit, data.random_batch(generator), config.p, scales)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for scale, floor in zip(scales, floors, strict=True):
                scale.clamp_(min=floor)
        if (iteration + 1) % max(1, config.iters_a // VALIDATIONS) == 0 or iteration + 1 == config.iters_a:
            error = data.validation_loss(unit, config.p)
            if error < best:
                best, kept = error, [scale.detach().clone() for scale in scales]
        on_iteration(loss)
    distributed.from_first(kept)
    for quantizer, scale in zip(learned, kept, strict=True):
        quantizer.scale, quantizer.learning = scale, False
    return UnitResult(before, best)
