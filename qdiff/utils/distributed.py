"""Data parallelism over several processes: which process this is, and how the processes exchange numbers.

All functions also work in a single process that never initialized `torch.distributed`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qdiff.errors import ConfigError

T = TypeVar("T")


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, counted from 0."""
    return dist.get_rank() if world() > 1 else 0


def barrier() -> None:
    """Wait until all processes get here."""
    if world() > 1:
        dist.barrier()


def share(batch: Tensor) -> Tensor:
    """The part of a batch that this process works on: every n-th sample of n processes."""
    return batch[rank() :: world()]


def _exchangeable(tensor: Tensor) -> Tensor:
    """The tensor on a device where the processes can exchange it: the GPU with NCCL, else the CPU."""
    return tensor if tensor.is_cuda and "cuda:nccl" in str(dist.get_backend_config()) else tensor.cpu()


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in place; tensors of one type are exchanged as one."""
    if world() == 1:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in alike.values():
        exchanged = _exchangeable(torch.cat([tensor.flatten() for tensor in group]))
        dist.all_reduce(exchanged)
        for tensor, total in zip(group, exchanged.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(total.view_as(tensor))


def from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with the tensors of the first process, so that rounding cannot make the processes differ."""
    if world() > 1:
        for tensor in tensors:
            exchanged = _exchangeable(tensor.detach()).contiguous()
            dist.broadcast(exchanged, src=0)
            with torch.no_grad():
                tensor.copy_(exchanged)


def agree(value: float) -> float:
    """Return the first process's value on every process."""
    if world() == 1:
        return value
    exchanged = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(exchanged, src=0)
    return exchanged.item()


def any_failed(error: str | None) -> str | None:
    """Let all processes fail together.

    Args:
        error: the message of this process's error; None: it succeeded.

    Returns:
        The first message among the processes, on every process; None: all succeeded.
    """
    if world() == 1:
        return error
    errors: list[str | None] = [None] * world()
    dist.all_gather_object(errors, error)
    return next((message for message in errors if message is not None), None)


def connect(device: torch.device | None = None) -> None:
    """Join the processes that torchrun started, if it did; a second call changes nothing.

    Args:
        device: the device of the work. Tensors on GPUs are exchanged by NCCL, those on CPUs by gloo.

    Raises:
        ConfigError: some of the variables that torchrun sets are there, and others are not; more processes than GPUs.
    """
    processes = _torchrun_number("WORLD_SIZE", 1)
    if processes > 1 and not dist.is_initialized():
        _launch(processes, gpus=device is not None and device.type == "cuda")


def run_on_first(make: Callable[[], T]) -> T:
    """Call `make` on the first process; every process returns its result, or raises its error."""
    if world() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _torchrun_number(name: str, default: int) -> int:
    """A number that torchrun sets for each of its processes."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name}={text} in the environment: expected a whole number")
    missing = [other for other in TORCHRUN if other not in os.environ]
    if int(text) > 1 and missing:
        raise ConfigError(
            f"{name}={text} in the environment without {', '.join(missing)}: "
            "expected all of them (torchrun sets them) or none (unset it)"
        )
    return int(text)


def _launch(processes: int, gpus: bool) -> None:
    from lightning_fabric import Fabric  # takes two seconds, for which one process alone has no use
    from lightning_fabric.strategies import DDPStrategy

    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if gpus and local > torch.cuda.device_count():
        raise ConfigError(
            f"{local} processes on this machine with {torch.cuda.device_count()} GPU(s): "
            "expected at most one process for each"
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    strategy = DDPStrategy(process_group_backend=backend, timeout=timedelta(days=30))  # a calibration may take long
    accelerator = "cuda" if gpus else "cpu"
    Fabric(accelerator=accelerator, devices=local, num_nodes=processes // local, strategy=strategy).launch()
