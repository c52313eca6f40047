"""Work over batches of rows: halved where memory does not suffice, shared by the processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qdiff.utils import distributed
from qdiff.utils.memory import halving


def in_batches(work: Callable[[slice], None], rows: range, size: int) -> None:
    """Call `work` on all `rows`, at most `size` consecutive ones at a time; it must leave nothing behind where it fails."""
    for start in range(0, len(rows), size):
        halving(lambda part: work(slice(part.start, part.stop)), rows[start : start + size])


def mean_loss(loss: Callable[[slice], Tensor], rows: range, size: int) -> float:
    """The mean of `loss`, which is a mean over the rows it gets, over all `rows`; the same on every process."""
    total = 0.0

    def add(part: slice) -> None:
        nonlocal total
        total += loss(part).item() * (part.stop - part.start)

    in_batches(add, rows, size)
    return distributed.agree(total / len(rows))


def add_gradients(loss: Callable[[Tensor], Tensor], batch: Tensor, parameters: Sequence[Tensor]) -> float:
    """Add the gradients of `loss`, a mean over the row numbers it gets, to those of the parameters; return its value over `batch`.

    Each process takes its share of the batch; a share that does not fit into memory is halved.
    """
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    value = torch.zeros(1, dtype=torch.float64)

    def work(part: Tensor) -> None:
        weighted = loss(part) * (len(part) / len(batch))
        found = torch.autograd.grad(weighted, parameters, allow_unused=True, materialize_grads=True)
        for total, gradient in zip(sums, found, strict=True):
            total += gradient
        value.add_(weighted.item())

    if len(mine := distributed.share(batch)):
        halving(work, mine)
    distributed.sum_over_ranks([*sums, value])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return value.item()
