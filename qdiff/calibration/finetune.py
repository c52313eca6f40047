"""End-to-end fine-tuning of the few floating-point parameters against the network's output.

The loss of a unit says little about what the unit does to eps. So after all units the activation scales, the biases
and the affine parameters of the normalizations (some thousand numbers, which every checkpoint format holds in full
precision) are trained on the relative error of eps over all time steps, which is what the images depend on. The
integers of the weights stay as they are.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qdiff.calibration.batches import add_gradients, mean_loss
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.reconstruct import UnitResult
from qdiff.config import CalibrationConfig
from qdiff.layers import QuantLayer, to_float32
from qdiff.model import act_quantizers
from qdiff.prediction import Prediction
from qdiff.utils import distributed

VALIDATIONS = 6  # each costs a pass of both networks over the validation split


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """||output - target|| / ||target|| of each sample, averaged."""
    output, target = to_float32(output), to_float32(target)
    return ((output - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).mean()


class FineTuner:
    """Fine-tunes a quantized network against its full-precision one.

    Scales are trained by their logarithms with the learning rate `lr_tune`, the other parameters with a tenth of it.

    Args:
        model: the full-precision network.
        quantized: the quantized network; changed in place.
        data: the samples, with their splits.
        config: the recipe.
        prediction: turns the output of both networks into eps; None: the outputs are compared as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        quantized: nn.Module,
        data: CalibrationData,
        config: CalibrationConfig,
        prediction: Prediction | None = None,
    ) -> None:
        self.model, self.quantized, self.data, self.config, self.prediction = model, quantized, data, config, prediction
        self.device = next(model.parameters()).device
        self.enabled = [q for q in act_quantizers(quantized).values() if q.enabled]
        self.learned = [q for q in self.enabled if q.n_bits < 16]
        self.first_scales = [q.scale.clone() for q in self.learned]
        self.log_factors = [torch.zeros_like(q.scale).requires_grad_() for q in self.learned]
        self.others = _own_parameters(quantized)
        self.parameters: list[Tensor] = [*self.log_factors, *self.others]

    def run(self, on_iteration: Callable[[float], None]) -> UnitResult:
        """Train by Adam; the parameters with the least validation loss stay, the first ones included.

        Args:
            on_iteration: called with the loss after every iteration.
        """
        config = self.config
        before = best = self.validation_loss()
        best_values = [parameter.detach().clone() for parameter in self.parameters]
        generator = torch.Generator().manual_seed(config.seed)
        groups = [
            {"params": self.log_factors, "lr": config.lr_tune},
            {"params": self.others, "lr": config.lr_tune / 10},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters_tune)
        for iteration in range(config.iters_tune):
            batch = torch.randint(0, len(self.data.train), (config.batch_tune,), generator=generator)
            optimizer.zero_grad()
            loss = add_gradients(self.training_loss, batch, self.parameters)
            optimizer.step()
            schedule.step()
            done = iteration + 1
            if done % max(1, config.iters_tune // VALIDATIONS) == 0 or done == config.iters_tune:
                error = self.validation_loss()
                if error < best:
                    best, best_values = error, [value.detach().clone() for value in self.parameters]
            on_iteration(loss)
        self._finish(best_values)
        return UnitResult(before, best)

    def loss(self, part: Tensor | slice) -> Tensor:
        """The mean relative error of eps over some samples."""
        with torch.no_grad():
            target = self.eps(part, self.data.run(self.model, part, self.device))
        return relative_error(self.eps(part, self.data.run(self.quantized, part, self.device)), target)

    def training_loss(self, part: Tensor) -> Tensor:
        """The same with a graph of its own, so that a batch can be split."""
        self._set_scales(learning=True)
        return self.loss(part)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The loss over the validation split."""
        self._set_scales(learning=False)
        return mean_loss(self.loss, self.data.validation, self.config.batch_size)

    def eps(self, part: Tensor | slice, output: Tensor) -> Tensor:
        """What a network's output for some samples says of the noise."""
        if self.prediction is None:
            return output
        x, t = self.data.x(part).to(self.device), self.data.timesteps(part).to(self.device)
        return self.prediction.eps(x, t, output)

    def _set_scales(self, learning: bool) -> None:
        for quantizer in self.enabled:
            quantizer.learning = learning
        for quantizer, first, factor in zip(self.learned, self.first_scales, self.log_factors, strict=True):
            scale = first * factor.exp()
            quantizer.scale = scale if learning else scale.detach()

    def _finish(self, values: Sequence[Tensor]) -> None:
        distributed.from_first(values)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        self._set_scales(learning=False)
        self.quantized.requires_grad_(False)


def _own_parameters(quantized: nn.Module) -> list[nn.Parameter]:
    """Biases and norm affines as parameters that can be trained and are not shared with the full-precision network."""
    found = []
    for module in quantized.modules():
        if isinstance(module, QuantLayer | nn.GroupNorm | nn.LayerNorm):
            for name, parameter in list(module.named_parameters(recurse=False)):
                own = nn.Parameter(parameter.detach().clone())
                setattr(module, name, own)
                found.append(own)
    return found
