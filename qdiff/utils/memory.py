"""Work on a batch that halves itself where the device has not enough memory; how much memory work takes."""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

log = logging.getLogger(__name__)
T = TypeVar("T", bound=Sequence[int])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device (CUDA, MPS), the CPU's allocator or Python ran out of memory."""
    words = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
    )  # of the CPU, on Linux and on Windows; of MPS
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


@dataclass
class Fitting:
    """The largest batch that is known to fit into memory; None: no batch failed yet."""

    rows: int | None = None


def halving(work: Callable[[T], None], rows: T, fitting: Fitting | None = None) -> None:
    """Call `work` on `rows`, on its halves where memory does not suffice, and so on down to single rows.

    `work` must leave nothing behind where it fails. `fitting` is remembered from call to call: what did not fit is not tried again.
    """
    fitting = fitting or Fitting()
    if fitting.rows is None or len(rows) <= fitting.rows:
        try:
            work(rows)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
        fitting.rows = (len(rows) + 1) // 2
        log.warning("out of memory with a batch of %d: continuing with %d", len(rows), fitting.rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    middle = (len(rows) + 1) // 2
    halving(work, rows[:middle], fitting)
    halving(work, rows[middle:], fitting)


def largest_fitting(work: Callable[[T], None], rows: T) -> int:
    """Call `work` on the first of `rows`: all, half of them where memory does not suffice, and so on; how many it was done on."""
    while True:
        try:
            work(rows)
            return len(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
        log.warning("out of memory with %d rows: taking %d of them", len(rows), len(rows) // 2)
        rows = rows[: len(rows) // 2]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def peak_memory() -> int:
    """Bytes of memory that this process held at its peak."""
    try:
        import resource  # not on Windows
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def working_memory(device: torch.device, peaks: list[int]) -> Iterator[None]:
    """Append the bytes that the work inside holds at its peak, above what was held before, to `peaks`.

    On CUDA as PyTorch allocates it, on the CPU as Linux counts resident memory; elsewhere nothing is appended.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    elif device.type == "cpu" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, but not given back, would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status("VmRSS")
        yield
        peaks.append(max(0, _status("VmHWM") - before))
    else:
        yield


def _status(name: str) -> int:
    """Bytes of a line of this process's status on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
