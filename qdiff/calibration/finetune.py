"""End-to-end fine-tuning of a quantized network against the full-precision network's output.

The loss of a unit says little about what the unit does to eps. So after all units the parameters that every file holds
in floating point are trained on the relative error of eps over all time steps, which is what the images depend on.
There are two rounds. The first one, without quantized activations, trains the scales of the weights (PEQA, arXiv
2305.14152), their rounding, the biases and the affine parameters of the normalizations. The second one, with quantized
activations, trains the scales of the activations, and biases and norms once more: each mode has values of its own.

Everything is trained in steps relative to its size, so the result does not depend on the units of the activations.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.calibration.batches import add_gradients, in_batches, mean_loss, relative_errors
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.recompute import recomputed
from qdiff.calibration.reconstruct import OnIteration, UnitResult
from qdiff.config import CalibrationConfig
from qdiff.layers import ActQuantizer, QuantLayer, dequantize
from qdiff.model import act_quantizers, quant_layers
from qdiff.prediction import Prediction
from qdiff.refusals import NORMS
from qdiff.utils import distributed
from qdiff.utils.memory import Fitting, is_out_of_memory

log = logging.getLogger(__name__)

VALIDATIONS, VALIDATION_SAMPLES = 6, 64  # each costs a pass of both networks over so many samples
AFFINE_SHARE = 0.1  # of the learning rate, for biases and norms
SIZE_SAMPLES = 16  # that the sizes of outputs are measured on


@dataclass
class Trained:
    """A tensor that is trained.

    Attributes:
        tensor: the leaf.
        size: its unit: gradients are multiplied and steps are taken in multiples of it.
        rate: its learning rate, in units of `size`.
    """

    tensor: Tensor
    size: float
    rate: float


class ActScales:
    """The scale of an activation quantizer, trained by its logarithm."""

    def __init__(self, quantizer: ActQuantizer, rate: float) -> None:
        self.quantizer, self.first = quantizer, quantizer.scale.clone()
        self.factor = torch.zeros_like(quantizer.scale).requires_grad_()
        self.trained = [Trained(self.factor, 1.0, rate)]

    def apply(self, learning: bool) -> None:
        """Put the scale into the quantizer, with gradients if `learning`."""
        scale = self.first * self.factor.exp()
        self.quantizer.scale, self.quantizer.learning = (scale if learning else scale.detach()), learning

    def finish(self) -> None:
        """Fix the scale."""
        self.apply(learning=False)


class LayerWeight:
    """The scales of a layer's weight, trained by their logarithms, and its rounding.

    The rounding is trained on numbers in the unit of the integers, which are rounded in the forward pass; gradients
    pass straight through.
    """

    def __init__(self, layer: QuantLayer, rate: float) -> None:
        self.layer = layer
        self.quantizers = layer.weight_quantizers
        self.factors = [torch.zeros_like(q.scale).requires_grad_() for q in self.quantizers]
        self.values = [q.integers.to(q.scale.dtype).requires_grad_() for q in self.quantizers]
        steps = 2 ** (self.quantizers[0].n_bits - 1)
        self.trained = [Trained(factor, 1.0, 8 * rate / steps) for factor in self.factors]
        self.trained += [Trained(value, 1.0, rate) for value in self.values]

    def apply(self, learning: bool) -> None:
        """Let the layer take its weight from here. Whether there are gradients, the forward pass decides."""
        self.layer.freeze()  # its weight of before is not needed
        self.layer.learned_weight = self.weight

    def weight(self) -> Tensor:
        """The weight, computed in the layer's forward pass, because those of all layers would fill the memory."""
        parts = []
        for quantizer, factor, value in zip(self.quantizers, self.factors, self.values, strict=True):
            integers = Q.round_ste(value.clamp(*Q.integer_range(quantizer.n_bits, symmetric=False)))
            parts.append(dequantize(integers, quantizer.scale * factor.exp(), quantizer.zero_point))
        return self.layer._join(parts)

    @torch.no_grad()
    def finish(self) -> None:
        """Fix the scales and the integers."""
        integers = []
        for quantizer, factor, value in zip(self.quantizers, self.factors, self.values, strict=True):
            quantizer.scale = quantizer.scale * factor.exp()
            integers.append(value.clamp(*Q.integer_range(quantizer.n_bits, symmetric=False)).round())
        self.layer.set_integers(integers)


class FineTuner:
    """Fine-tunes a quantized network against its full-precision one.

    Args:
        model: the full-precision network.
        quantized: the quantized network; changed in place.
        data: the samples, with their splits.
        config: the recipe.
        prediction: turns the output of both networks into eps; None: the outputs are compared as they are.
        weights: train the weights too.
        blocks: on a GPU, the activations inside these modules are computed again in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        quantized: nn.Module,
        data: CalibrationData,
        config: CalibrationConfig,
        prediction: Prediction | None = None,
        weights: bool = False,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.quantized, self.data, self.config, self.prediction = model, quantized, data, config, prediction
        self.device = next(model.parameters()).device
        enabled = [q for q in act_quantizers(quantized).values() if q.enabled and q.n_bits < 16]
        self.trains_weights, self.fitting = weights, Fitting()
        self.blocks = blocks if self.device.type == "cuda" else ()
        layers = quant_layers(quantized).values() if weights else ()
        self.groups: list[ActScales | LayerWeight] = [ActScales(quantizer, config.lr_tune) for quantizer in enabled]
        self.groups += [LayerWeight(layer, config.lr_tune) for layer in layers]
        self.trained = [one for group in self.groups for one in group.trained]
        self.trained += self._affine_parameters()
        self.unneeded = self._unneeded() if self.device.type == "cuda" else []

    def run(self, on_iteration: OnIteration) -> UnitResult:
        """Train by Adam; the parameters with the least validation loss stay, the first ones included.

        If one sample alone does not fit into memory, what was trained so far stays, and a line in the log says so.

        Args:
            on_iteration: called with the loss after every iteration.
        """
        self.targets = self._find_targets()
        with _on_cpu(self.unneeded, self.device):
            return self._run(on_iteration)

    def _run(self, on_iteration: OnIteration) -> UnitResult:
        config, tensors = self.config, [one.tensor for one in self.trained]
        iterations = config.iters_tune if self.trains_weights else config.iters_tune_a
        before = best = self.validation_loss()
        best_values = _copies(tensors)
        generator = torch.Generator().manual_seed(config.seed)
        groups = [{"params": [one.tensor], "lr": one.rate * one.size} for one in self.trained]
        optimizer = torch.optim.Adam(groups, foreach=False)  # all at once takes more memory
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iterations)
        for iteration in range(iterations):
            batch = torch.randint(0, len(self.data.train), (config.batch_tune,), generator=generator)
            try:
                loss = add_gradients(self.training_loss, batch, tensors, self.fitting)
            except (RuntimeError, MemoryError) as failure:
                if not is_out_of_memory(failure) or distributed.world() > 1:
                    raise
                log.warning("end-to-end fine-tuning ends after %d iterations: one sample is too large", iteration)
                break
            for one in self.trained:
                assert one.tensor.grad is not None  # set by add_gradients
                one.tensor.grad *= one.size
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done = iteration + 1
            if done % max(1, iterations // VALIDATIONS) == 0 or done == iterations:
                error = self.validation_loss()
                if error < best:
                    best, best_values = error, _copies(tensors)
            on_iteration(loss)
        self._finish(best_values)
        return UnitResult(before, best)

    def loss(self, part: Tensor | slice) -> Tensor:
        """The mean relative error of eps over some samples."""
        target = self.targets[part].to(self.device)
        return relative_errors(self.eps(part, self.data.run(self.quantized, part, self.device)), target).mean()

    @torch.no_grad()
    def _find_targets(self) -> Tensor:
        """What the full-precision network says of the noise of all samples, [N, ...]."""
        found: list[Tensor] = []

        def work(part: slice) -> None:
            found.append(self.eps(part, self.data.run(self.model, part, self.device)).cpu())

        in_batches(work, range(len(self.data)), self.config.batch_size)
        return torch.cat(found)

    def training_loss(self, part: Tensor) -> Tensor:
        """The same with a graph of its own, so that a batch can be split."""
        self._apply(learning=True)
        with recomputed(self.blocks):
            return self.loss(part)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The loss over the validation split."""
        self._apply(learning=False)
        few = self.data.validation[:VALIDATION_SAMPLES]
        return mean_loss(self.loss, few, self.config.batch_size)

    def eps(self, part: Tensor | slice, output: Tensor) -> Tensor:
        """What a network's output for some samples says of the noise."""
        output = output.float()
        if self.prediction is None:
            return output
        x, t = self.data.x(part).to(self.device), self.data.timesteps(part).to(self.device)
        return self.prediction.eps(x, t, output)

    def _apply(self, learning: bool) -> None:
        for group in self.groups:
            group.apply(learning)

    def _finish(self, values: Sequence[Tensor]) -> None:
        distributed.from_first(values)
        with torch.no_grad():
            for one, value in zip(self.trained, values, strict=True):
                one.tensor.copy_(value)
                one.tensor.grad = None
        for group in self.groups:
            group.finish()
        self.quantized.requires_grad_(False)

    def _unneeded(self) -> list[nn.Module]:
        """The layers of the full-precision network that share nothing with the quantized one."""
        shared = {id(parameter) for parameter in self.quantized.parameters()}
        layers = [self.model.get_submodule(path) for path in quant_layers(self.quantized)]
        return [layer for layer in layers if shared.isdisjoint(map(id, layer.parameters()))]

    def _affine_parameters(self) -> list[Trained]:
        """Biases and norm affines as parameters of their own, not shared with the full-precision network."""
        rate, found = self.config.lr_tune * AFFINE_SHARE, []
        sizes = _output_sizes(self.quantized, self._run_few)
        for path, name in affine_names(self.quantized):
            module = self.quantized.get_submodule(path)
            own = nn.Parameter(module.get_parameter(name).detach().clone())
            size = sizes.get(path, 0.0) if isinstance(module, QuantLayer) else _root_mean_square(module.weight)
            setattr(module, name, own)
            found.append(Trained(own, size, rate))
        return found

    def _run_few(self) -> None:
        few = torch.arange(min(SIZE_SAMPLES, len(self.data)))
        self.data.run(self.quantized, few, self.device)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, in the CPU's memory."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


@contextmanager
def _on_cpu(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep modules that the work inside does not need in the CPU's memory."""
    try:
        for module in modules:
            module.to("cpu")
        yield
    finally:
        for module in modules:
            module.to(device)


def affine_names(quantized: nn.Module) -> Iterator[tuple[str, str]]:
    """The biases of quantized layers and the affine parameters of normalizations: (path of the module, name)."""
    for path, module in quantized.named_modules():
        if isinstance(module, (QuantLayer, *NORMS)):
            for name, _ in module.named_parameters(recurse=False):
                yield path, name


def _root_mean_square(values: object) -> float:
    return float(values.detach().float().square().mean().sqrt()) if isinstance(values, Tensor) else 0.0


@torch.no_grad()
def _output_sizes(quantized: nn.Module, run: Callable[[], None]) -> dict[str, float]:
    """The root mean square of the output of every quantized layer, by path, in one forward pass."""
    sizes: dict[str, float] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, path=path: sizes.update({path: _root_mean_square(output)}))
        for path, layer in quant_layers(quantized).items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sizes
