"""Activations of all calibration samples under a byte budget: in memory first, then in memory-mapped files."""

import os
import shutil
import tempfile
from pathlib import Path

import psutil
import torch
from torch import Tensor

from qdiff.errors import ConfigError
from qdiff.utils import distributed

PREFIX = ".activations."
# Values of one sample up to which a tensor is cached exactly: time steps and other inputs of embeddings, whose last
# digits matter and whose size does not.
EXACT_UP_TO = 64


class Cache:
    """Room for tensors over all samples.

    Args:
        budget: bytes of memory; what does not fit goes to files. None: half of the memory that is free now, shared by
            all processes.
        folder: where those files lie. They lose their names once they are mapped, so that a crash leaves nothing
            behind.
        dtype: the type of cached floating-point values, float32 or bfloat16 (relative error up to 0.4 %). Tensors
            with few values a sample are always exact.
    """

    def __init__(
        self, budget: int | None = None, folder: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.budget = free_memory() // 2 // distributed.world() if budget is None else budget
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder
        self.dtype = dtype
        self.used = 0

    def item_size(self, dtype: torch.dtype) -> int:
        """Bytes of one cached value of type `dtype`."""
        return (self.dtype if dtype.is_floating_point else dtype).itemsize

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
        short = torch.Size(shape[1:]).numel() <= EXACT_UP_TO
        cached = self.dtype if dtype.is_floating_point and not short else dtype
        size = torch.Size(shape).numel() * cached.itemsize
        if self.used + size <= self.budget or size == 0:
            self.used += size
            return CachedTensor(self, torch.empty(shape, dtype=cached), size, dtype)
        return CachedTensor(self, self._mapped(shape, cached, size), 0, dtype)

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
    """A tensor [samples, ...] in a cache. Reads give the type that was written, on any device.

    Args:
        cache: the cache whose budget it counts against.
        tensor: its values, in memory or in a mapped file.
        charged: bytes that it counts.
        dtype: the type that reads give.
    """

    def __init__(self, cache: Cache, tensor: Tensor, charged: int, dtype: torch.dtype) -> None:
        self.cache, self.tensor, self.charged, self.dtype = cache, tensor, charged, dtype

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """A copy of some samples, which may be changed in place."""
        return self.tensor[index].to(device, self.dtype, copy=isinstance(index, slice))

    def write(self, index: Tensor | slice, samples: Tensor) -> None:
        """Store some samples."""
        self.tensor[index] = samples.detach().to(self.tensor)

    def release(self) -> None:
        """Give the room back."""
        self.cache.used -= self.charged
        self.charged, self.tensor = 0, self.tensor[:0].clone()


def remove_leftovers(folder: Path) -> None:
    """Remove the files of a process that was killed before they lost their names."""
    for path in folder.glob(f"{PREFIX}*"):
        path.unlink(missing_ok=True)


def free_memory() -> int:
    """Bytes of memory that processes can take now without swapping."""
    return psutil.virtual_memory().available
