"""Work over batches of samples, halved if memory does not suffice, shared by the processes; and errors over them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qdiff.layers import to_float32
from qdiff.utils import distributed
from qdiff.utils.memory import Fitting, halving


def in_batches(work: Callable[[slice], None], indices: range, size: int, fitting: Fitting | None = None) -> None:
    """Call `work` on all `indices`, in slices of at most `size`.

    On out-of-memory a slice is split in half and retried; `work` must have no side effects when it raises. Batch sizes
    that failed once are not tried again, in later calls with the same `fitting` neither.
    """
    fitting = fitting or Fitting()
    for start in range(0, len(indices), size):
        halving(lambda part: work(slice(part.start, part.stop)), indices[start : start + size], fitting)


def mean_loss(loss: Callable[[slice], Tensor], indices: range, size: int, fitting: Fitting | None = None) -> float:
    """The mean of `loss`, itself a mean over the samples it gets, over all `indices`; the same on every process."""
    total = 0.0

    def add(part: slice) -> None:
        nonlocal total
        total += loss(part).item() * (part.stop - part.start)

    in_batches(add, indices, size, fitting)
    return distributed.agree(total / len(indices))


def relative_errors(output: Tensor, target: Tensor) -> Tensor:
    """||output - target|| / ||target|| of each sample, float32 [N]."""
    output, target = to_float32(output).flatten(1), to_float32(target).flatten(1)
    return (output - target).norm(dim=1) / target.norm(dim=1).clamp(min=torch.finfo(target.dtype).tiny)


def add_gradients(
    loss: Callable[[Tensor], Tensor],
    batch: Tensor,
    parameters: Sequence[Tensor],
    fitting: Fitting | None = None,
) -> Tensor:
    """Add the gradients of a loss over one batch to those of the parameters.

    Each process takes its share of the batch; a share that does not fit into memory is halved.

    Args:
        loss: from sample indices to the mean loss of these samples.
        batch: sample indices, [B].
        parameters: leaf tensors.
        fitting: if it is passed to several calls, batch sizes that failed once are not tried again.

    Returns:
        The loss over the whole batch, where the parameters are: reading it waits for the device.
    """
    sums: list[Tensor] = []
    device = parameters[0].device
    value = torch.zeros(1, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def work(part: Tensor) -> None:
        weighted = loss(part) * (len(part) / len(batch))
        found = list(torch.autograd.grad(weighted, parameters, allow_unused=True, materialize_grads=True))
        added = []
        for total in sums or map(torch.zeros_like, parameters):
            # each is freed once it is added: together they may be as large as the network
            added.append(total.add_(found.pop(0)))
        sums[:] = added
        value.add_(weighted.detach())

    if len(mine := distributed.share(batch)):
        halving(work, mine, fitting)
    sums = sums or [torch.zeros_like(parameter) for parameter in parameters]
    distributed.sum_over_ranks([*sums, value])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return value.squeeze(0)
