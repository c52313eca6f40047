"""After the units: the numbers that are few, together, against the output of the whole network.

A unit's own error says little about what it does to eps. So at the end the activation step sizes, the biases and
the affine parameters of the normalizations, some thousand numbers that every checkpoint format holds in
full precision, are fitted to the relative error of eps over all time steps, which is what the images
depend on. The integers of the weights stay as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff import ranks
from qdiff.calibration.dataset import Rows
from qdiff.calibration.memory import halving
from qdiff.calibration.reconstruct import UnitResult
from qdiff.config import CalibrationConfig
from qdiff.layers import QuantLayer
from qdiff.model import act_quantizers

HELD_OUT_CHECKS = 6  # each costs a pass of both networks over the held-out rows


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """||output - target|| / ||target|| of each row, averaged."""
    return ((output - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).mean()


def tune(
    model: nn.Module,
    wrapped: nn.Module,
    rows: Rows,
    held_out_from: int,
    config: CalibrationConfig,
    device: torch.device,
    tick: Callable[[float], None],
) -> UnitResult:
    """Fit by Adam; what is best on the held-out rows, the start included, is kept.

    Step sizes are fitted by their logarithms with the rate `lr_tune`, the others with a tenth of it.
    """

    def read(index: Tensor | slice) -> list[Tensor]:
        return [part.to(device) for part in rows[index]]

    @torch.no_grad()
    def held_out_error() -> float:
        total = 0.0

        def work(part: range) -> None:
            nonlocal total
            inputs = read(slice(part[0], part[-1] + 1))
            total += relative_error(wrapped(*inputs), model(*inputs)).item() * len(part)

        for start in range(held_out_from, len(rows), config.batch_size):
            halving(work, range(start, min(start + config.batch_size, len(rows))))
        return ranks.agree(total / (len(rows) - held_out_from))

    quantizers = [q for q in act_quantizers(wrapped).values() if q.enabled]
    learned = [q for q in quantizers if q.n_bits < 16]
    starts = [q.delta.clone() for q in learned]
    logs = [torch.zeros_like(q.delta).requires_grad_() for q in learned]
    others = _own_parameters(wrapped)
    parameters = [*logs, *others]
    before = best = held_out_error()
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(config.seed)
    groups = [{"params": logs, "lr": config.lr_tune}, {"params": others, "lr": config.lr_tune / 10}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters_tune)

    def place(learning: bool) -> None:
        for quantizer in quantizers:
            quantizer.learning = learning
        for quantizer, start, value in zip(learned, starts, logs, strict=True):
            quantizer.delta = start * value.exp() if learning else (start * value.exp()).detach()

    for step in range(config.iters_tune):
        batch = torch.randint(0, held_out_from, (config.batch_tune,), generator=generator)
        sums = [torch.zeros_like(value) for value in parameters]
        losses = torch.zeros(1, dtype=torch.float64)

        def work(part: Tensor, batch: Tensor = batch, sums: list[Tensor] = sums, losses: Tensor = losses) -> None:
            place(learning=True)
            inputs = read(part)
            with torch.no_grad():
                target = model(*inputs)
            loss = relative_error(wrapped(*inputs), target) * (len(part) / len(batch))
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True), strict=True):
                total += gradient
            losses.add_(loss.item())

        if len(mine := ranks.share(batch)):
            halving(work, mine)
        ranks.sum_over_ranks([*sums, losses])
        for value, gradient in zip(parameters, sums, strict=True):
            value.grad = gradient
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, config.iters_tune // HELD_OUT_CHECKS) == 0 or step + 1 == config.iters_tune:
            place(learning=False)
            error = held_out_error()
            if error < best:
                best, kept = error, [value.detach().clone() for value in parameters]
        tick(losses.item())
    ranks.from_first(kept)
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
