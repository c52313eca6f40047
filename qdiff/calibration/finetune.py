"""After the units: the numbers that are few, together, against the output of the whole network.

A unit's own error says little about what it does to eps. So at the end the activation step sizes, the biases and
the affine parameters of the normalizations, some thousand numbers that every checkpoint format holds in
full precision, are fitted to the relative error of eps over all time steps, which is what the images
depend on. The integers of the weights stay as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.calibration.batches import add_gradients, mean_loss
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.reconstruct import UnitResult
from qdiff.config import CalibrationConfig
from qdiff.layers import QuantLayer
from qdiff.model import act_quantizers
from qdiff.prediction import Prediction
from qdiff.utils import distributed

HELD_OUT_CHECKS = 6  # each costs a pass of both networks over the held-out rows


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """||output - target|| / ||target|| of each row, averaged."""
    return ((output - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).mean()


def finetune(
    model: nn.Module,
    wrapped: nn.Module,
    rows: CalibrationData,
    held_out_from: int,
    config: CalibrationConfig,
    device: torch.device,
    tick: Callable[[float], None],
    prediction: Prediction | None = None,
) -> UnitResult:
    """Fit by Adam; what is best on the held-out rows, the start included, is kept.

    The error is that of eps, which `prediction` makes of the network's output (None: the output is what is compared).

    Step sizes are fitted by their logarithms with the rate `lr_tune`, the others with a tenth of it.
    """
    quantizers = [q for q in act_quantizers(wrapped).values() if q.enabled]
    learned = [q for q in quantizers if q.n_bits < 16]
    starts = [q.scale.clone() for q in learned]
    logs = [torch.zeros_like(q.scale).requires_grad_() for q in learned]
    others = _own_parameters(wrapped)
    parameters = [*logs, *others]

    def place(learning: bool) -> None:
        for quantizer in quantizers:
            quantizer.learning = learning
        for quantizer, start, value in zip(learned, starts, logs, strict=True):
            quantizer.scale = start * value.exp() if learning else (start * value.exp()).detach()

    def eps(inputs: list[Tensor], output: Tensor) -> Tensor:
        return output if prediction is None else prediction.eps(inputs[0], inputs[1], output)

    def error_of(part: Tensor | slice) -> Tensor:
        inputs = [tensor.to(device) for tensor in rows[part]]
        with torch.no_grad():
            target = eps(inputs, model(*inputs))
        return relative_error(eps(inputs, wrapped(*inputs)), target)

    def learning_error(part: Tensor) -> Tensor:
        place(learning=True)  # each part has a graph of its own
        return error_of(part)

    @torch.no_grad()
    def held_out_error() -> float:
        place(learning=False)
        return mean_loss(error_of, range(held_out_from, len(rows)), config.batch_size)

    before = best = held_out_error()
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(config.seed)
    groups = [{"params": logs, "lr": config.lr_tune}, {"params": others, "lr": config.lr_tune / 10}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters_tune)
    for step in range(config.iters_tune):
        batch = torch.randint(0, held_out_from, (config.batch_tune,), generator=generator)
        optimizer.zero_grad()
        loss = add_gradients(learning_error, batch, parameters)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, config.iters_tune // HELD_OUT_CHECKS) == 0 or step + 1 == config.iters_tune:
            error = held_out_error()
            if error < best:
                best, kept = error, [value.detach().clone() for value in parameters]
        tick(loss)
    distributed.from_first(kept)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    place(learning=False)
    wrapped.requires_grad_(False)
    return UnitResult(before, best)


def _own_parameters(wrapped: nn.Module) -> list[nn.Parameter]:
    """Biases and the parameters of normalizations, no longer shared with the full-precision network, ready to be fitted."""
    found = []
    for module in wrapped.modules():
        if isinstance(module, QuantLayer | nn.GroupNorm | nn.LayerNorm):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
                found.append(getattr(module, name))
    return found
