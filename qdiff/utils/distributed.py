"""Several processes that work on one thing: which one this is, and how they exchange numbers."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def share(batch: Tensor) -> Tensor:
    """The part of a batch that this process works on."""
    return batch[rank() :: world()]


def _exchangeable(tensor: Tensor) -> Tensor:
    """The tensor where the processes can exchange it: on the GPU by NCCL, else on the CPU."""
    return tensor if tensor.is_cuda and "cuda:nccl" in str(dist.get_backend_config()) else tensor.cpu()


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add up tensors over the processes, in place."""
    if world() > 1:
        for tensor in tensors:
            exchanged = _exchangeable(tensor)
            dist.all_reduce(exchanged)
            tensor.copy_(exchanged)


def from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the first process, so that no last bit can set the processes apart."""
    if world() > 1:
        for tensor in tensors:
            exchanged = _exchangeable(tensor.detach()).contiguous()
            dist.broadcast(exchanged, src=0)
            with torch.no_grad():
                tensor.copy_(exchanged)


def agree(value: float) -> float:
    """The value of the first process, on every process."""
    if world() == 1:
        return value
    held = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(held, src=0)
    return held.item()


def any_failed(error: str | None) -> str | None:
    """The first error among the processes, on every process (None: all is well), so that they end together."""
    if world() == 1:
        return error
    found: list[str | None] = [None] * world()
    dist.all_gather_object(found, error)
    return next((text for text in found if text is not None), None)
