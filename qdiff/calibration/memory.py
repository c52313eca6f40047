"""Work on a batch that halves itself where the device has not enough memory."""

import logging
import resource
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
T = TypeVar("T", bound=Sequence[int])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device (CUDA, MPS) or the CPU's allocator ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def halving(work: Callable[[T], None], rows: T) -> None:
    """Call `work` on `rows`, on its halves where memory does not suffice, and so on down to single rows.

    `work` must leave nothing behind where it fails.
    """
    try:
        work(rows)
        return
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if not is_out_of_memory(error) or len(rows) == 1:
            raise
    log.warning("out of memory with a batch of %d: continuing with %d", len(rows), (len(rows) + 1) // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = (len(rows) + 1) // 2
    halving(work, rows[:middle])
    halving(work, rows[middle:])


def peak_memory() -> int:
    """Bytes of memory that this process held at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
