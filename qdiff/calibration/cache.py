"""Activations of all calibration samples under a byte budget: in memory first, then in memory-mapped files."""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from qdiff.errors import ConfigError
from qdiff.utils import distributed

PREFIX = ".activations."


class Cache:
    """Room for tensors over all samples.

    Args:
        budget: bytes of memory; what does not fit goes to files. None: half of the memory that is free now, shared by
            all processes.
        folder: where those files lie. They lose their names once they are mapped, so that a crash leaves nothing
            behind.
    """

    def __init__(self, budget: int | None = None, folder: Path | None = None) -> None:
        self.budget = free_memory() // 2 // distributed.world() if budget is None else budget
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder
        self.used = 0

    def check_space(self, peak: int, written: int) -> None:
        """Check that everything fits into the budget and onto the disk.

        Args:
            peak: bytes of activations that are cached at once at most.
            written: bytes of the results beside them.

        Raises:
            ConfigError: it does not fit.
        """
        free = shutil.disk_usage(self.folder).free
        if max(0, peak - self.budget) + written > free:
            raise ConfigError(
                f"calibration needs {peak / 1e9:.1f} GB for activations and {written / 1e9:.1f} GB for its files: "
                f"found {self.budget / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB free in {self.folder}; "
                "take fewer samples (num_timesteps, samples)"
            )

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> "CachedTensor":
        """Room for a tensor [samples, ...] of this shape; its content is undefined until it is written."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.used + size <= self.budget or size == 0:
            self.used += size
            return CachedTensor(self, torch.empty(shape, dtype=dtype), size)
        return CachedTensor(self, self._mapped(shape, dtype, size), 0)

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        handle, name = tempfile.mkstemp(prefix=PREFIX, dir=self.folder)
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash later
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
            return torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=dtype).reshape(shape)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: no room for {size / 1e9:.1f} GB of activations ({error.strerror})"
            ) from None
        finally:
            os.close(handle)
            os.unlink(name)


class CachedTensor:
    """A tensor [samples, ...] in a cache. Reads give it on any device.

    Args:
        cache: the cache whose budget it counts against.
        tensor: its values, in memory or in a mapped file.
        charged: bytes that it counts.
    """

    def __init__(self, cache: Cache, tensor: Tensor, charged: int) -> None:
        self.cache, self.tensor, self.charged = cache, tensor, charged

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """A copy of some samples, which may be changed in place.

        On the way to a GPU the samples pass pinned memory and a stream of their own, so that neither the CPU nor the
        work that the GPU is still busy with waits for the copy.
        """
        if device.type != "cuda":
            return self.tensor[index].to(device, copy=isinstance(index, slice))
        part = self.tensor[index]
        staged = torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)
        stream = _copy_stream(device)
        with torch.cuda.stream(stream):
            samples = staged.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        samples.record_stream(current)
        return samples

    def write(self, index: Tensor | slice, samples: Tensor) -> None:
        """Store some samples."""
        self.tensor[index] = samples.detach().to(self.tensor)

    def release(self) -> None:
        """Give the room back."""
        self.cache.used -= self.charged
        self.charged, self.tensor = 0, self.tensor[:0].clone()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the copies to a GPU."""
    return torch.cuda.Stream(device)


def remove_leftovers(folder: Path) -> None:
    """Remove the files of a process that was killed before they lost their names."""
    for path in folder.glob(f"{PREFIX}*"):
        path.unlink(missing_ok=True)


def free_memory() -> int:
    """Bytes of memory that processes can take now without swapping."""
    return psutil.virtual_memory().available
