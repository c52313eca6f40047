"""After the units: all activation step sizes together, against the output of the whole network.

A unit's own error says little about what it does to eps: the last step of the recipe fits the step sizes, a
few hundred numbers, to the relative error of eps over all time steps, which is what the images depend on.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.calibration import ranks
from qdiff.calibration.dataset import Rows
from qdiff.calibration.memory import halving
from qdiff.calibration.reconstruct import HELD_OUT_CHECKS, UnitResult
from qdiff.config import CalibrationConfig
from qdiff.model import act_quantizers


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """||output - target|| / ||target|| of each row, averaged."""
    return ((output - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).mean()


def tune_step_sizes(
    model: nn.Module,
    wrapped: nn.Module,
    rows: Rows,
    held_out_from: int,
    config: CalibrationConfig,
    device: torch.device,
    tick: Callable[[float], None],
) -> UnitResult:
    """Fit the logarithms of all activation step sizes by Adam; the best on the held-out rows, the start included, are kept."""

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

    learned = [q for q in act_quantizers(wrapped).values() if q.n_bits < 16]
    starts = [q.delta.clone() for q in learned]
    logs = [torch.zeros_like(q.delta).requires_grad_() for q in learned]
    before = best = held_out_error()
    kept = starts
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(logs, lr=config.lr_tune)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters_tune)

    def place(learning: bool) -> None:
        for quantizer, start, value in zip(learned, starts, logs, strict=True):
            quantizer.delta = start * value.exp() if learning else (start * value.exp()).detach()
            quantizer.learning = learning

    for step in range(config.iters_tune):
        batch = torch.randint(0, held_out_from, (config.batch_tune,), generator=generator)
        sums = [torch.zeros_like(value) for value in logs]
        losses = torch.zeros(1, dtype=torch.float64)

        def work(part: Tensor, batch: Tensor = batch, sums: list[Tensor] = sums, losses: Tensor = losses) -> None:
            place(learning=True)
            inputs = read(part)
            with torch.no_grad():
                target = model(*inputs)
            loss = relative_error(wrapped(*inputs), target) * (len(part) / len(batch))
            for total, gradient in zip(sums, torch.autograd.grad(loss, logs), strict=True):
                total += gradient
            losses.add_(loss.item())

        if len(mine := ranks.share(batch)):
            halving(work, mine)
        ranks.sum_over_ranks([*sums, losses])
        for value, gradient in zip(logs, sums, strict=True):
            value.grad = gradient
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, config.iters_tune // HELD_OUT_CHECKS) == 0 or step + 1 == config.iters_tune:
            place(learning=False)
            error = held_out_error()
            if error < best:
                best, kept = error, [q.delta.clone() for q in learned]
        tick(losses.item())
    ranks.from_first(kept)
    for quantizer, delta in zip(learned, kept, strict=True):
        quantizer.delta, quantizer.learning = delta, False
    return UnitResult(before, best)
