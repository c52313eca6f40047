"""Splitting batches that do not fit into memory, and measuring how much memory work takes."""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import psutil
import torch

log = logging.getLogger(__name__)


class Batch(Protocol):
    """Anything that has a length and can be sliced: a range of indices, a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> Self: ...


B = TypeVar("B", bound=Batch)

# how the CPU's allocator says so on Linux and on Windows, how MPS does, and how the libraries of CUDA do
_ALLOCATION_ERRORS = (
    *("can't allocate memory", "not enough memory", "out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device (CUDA, MPS), the CPU's allocator or Python ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_ERRORS)
    )


@dataclass
class Fitting:
    """The largest batch that is known to fit into memory.

    Attributes:
        rows: its number of samples; None: no batch has failed yet.
    """

    rows: int | None = None


def halving(work: Callable[[B], None], rows: B, fitting: Fitting | None = None) -> None:
    """Call `work` on a batch. On out-of-memory, split the batch in half and retry, down to single samples.

    Args:
        work: called with `rows` or with slices of it. It must have no side effects when it raises.
        rows: the batch.
        fitting: if it is passed to several calls, batch sizes that failed once are not tried again.
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
        _free_cached_memory()
    middle = (len(rows) + 1) // 2
    halving(work, rows[:middle], fitting)
    halving(work, rows[middle:], fitting)


def largest_fitting(work: Callable[[B], None], rows: B) -> int:
    """Call `work` on a batch. On out-of-memory, drop the second half of the batch and retry, down to one sample.

    Args:
        work: called with `rows` or with its beginning. It must have no side effects when it raises.
        rows: the batch.

    Returns:
        The number of samples that `work` succeeded with.
    """
    while True:
        try:
            work(rows)
            return len(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
        log.warning("out of memory with %d samples: taking %d of them", len(rows), len(rows) // 2)
        rows = rows[: len(rows) // 2]
        _free_cached_memory()


def _free_cached_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def retain_freed_memory() -> None:
    """Let the C library reuse the memory of freed tensors. This affects the whole process; it can be called again.

    By default it returns large blocks to the system, and every operator pays for page faults when it allocates again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not the GNU C library
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def peak_memory() -> int:
    """The largest amount of memory that this process has held so far, in bytes."""
    try:
        import resource  # not on Windows
    except ImportError:
        return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]  # psutil's stub is that of Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def working_memory(device: torch.device, peaks: list[int]) -> Iterator[None]:
    """Measure how much memory the work inside holds at its peak, above what was held before.

    CUDA counts what PyTorch allocates, Linux counts resident memory. On other devices nothing is measured.

    Args:
        device: the device that the work runs on.
        peaks: the measured number of bytes is appended to it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    elif device.type == "cpu" and sys.platform == "linux":
        # memory that was freed but not returned to the system would be used again without being counted
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status("VmRSS")
        yield
        peaks.append(max(0, _status("VmHWM") - before))
    else:
        yield


def _status(name: str) -> int:
    """Bytes in the line `name` of this process's status on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
