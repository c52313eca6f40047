"""The fused pointwise operators of the CPU engine.

GroupNorm statistics, affine maps, SiLU, additions and input quantization run in C++ kernels (`cpu_kernels.cpp`), which
are compiled on first use (2 s) and cached. Without a C++ compiler the same operators run in plain PyTorch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qdiff.utils.memory import retain_freed_memory

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]

Affine = tuple[Tensor, Tensor]  # (a, b), float32 [n, channels] each: the map a * value + b


@cache
def library() -> ctypes.CDLL | None:
    """The compiled operators, from the cache or compiled now; None, after one log line, if that is not possible."""
    compiler = shlex.split(  # CXX may hold several words: "ccache g++"
        os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""
    )
    if not compiler or not shutil.which(compiler[0]):
        log.warning("integer engine: no C++ compiler found: the pointwise work is not fused")
        return None
    flags = [*FLAGS, f"-march={_instructions()}"]
    variants = [[*flags, "-mprefer-vector-width=512", "-fopenmp"], [*flags, "-fopenmp"], flags]
    key = hashlib.sha256(
        SOURCE.read_bytes() + repr((compiler, variants, platform.machine(), _processor())).encode()
    ).hexdigest()[:16]
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdiff" / f"kernels-{key}.so"
        if not path.is_file():
            _compile(compiler, variants, path)
        retain_freed_memory()
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: the user has no home folder
        log.warning("integer engine: %s: the pointwise work is not fused", str(error).splitlines()[0])
        return None


def _instructions() -> str:
    """The instructions to compile for: AVX2 where PyTorch itself is limited to them, else all of the processor's."""
    return "x86-64-v3" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "native"


def _processor() -> str:
    """A description of the processor's instruction set; code that is compiled for it may not run on others."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def _compile(compiler: list[str], variants: list[list[str]], path: Path) -> None:
    """Compile with the first variant of flags that the compiler accepts; OSError if it accepts none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / "kernels.so"
        for flags in variants:
            command = [*compiler, *flags, str(SOURCE), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                output.replace(path)
                return
    raise OSError(f"{shlex.join(compiler)} failed: {(result.stderr.splitlines() or ['no message'])[0]}")


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _pointers(pair: tuple[Tensor, Tensor] | None) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    return (_pointer(None), _pointer(None)) if pair is None else (_pointer(pair[0]), _pointer(pair[1]))


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


class IntegerGrid(NamedTuple):
    """The integers that values are quantized to: clamp(round(value / divisor / scale), low, high) + zero.

    This is not `qdiff.quantizers.quantize_nearest`, which adds the zero point before it clamps.

    Attributes:
        scale: the scale.
        low: the lower bound, less the zero point.
        high: the upper bound, less the zero point.
        zero: the zero point.
        divisor: what the values of each channel are divided by first, float32 [channels]; None: nothing.
        dtype: uint8 or int8 for integers of one byte, uint16 for those of two.
    """

    scale: float
    low: float
    high: float
    zero: int
    divisor: Tensor | None = None
    dtype: torch.dtype = torch.uint8


class ChannelsLastView:
    """Activations as the operators read them. All arithmetic is float32.

    Args:
        data: float32 or bfloat16; its memory is read as [n, pixels, channels].
        n: the number of images.
        pixels: the number of pixels of an image.
        channels: the number of channels that are read.
        ld: the distance in memory from one pixel to the next, in values; at least `channels`.
        correction: (coef [channels], sums [n, pixels]): their product is subtracted from each value to correct for
            weight zero points; None: the values are right.

    Attributes:
        version: the version counter of `data` when this view was made, if `data` is a tensor of the network, which
            could change in place before it is read; else None.
    """

    version: int | None = None

    def __init__(
        self, data: Tensor, n: int, pixels: int, channels: int, ld: int, correction: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.data, self.n, self.pixels, self.channels, self.ld = data, n, pixels, channels, ld
        self.correction = correction

    def _check_version(self) -> None:
        if self.version is not None and self.data._version != self.version:
            raise RuntimeError(
                "an activation was changed in place between its GroupNorm and the product after it: "
                "the integer engine cannot follow that, expected the engine `simulated`"
            )

    def _arguments(self) -> tuple:
        """The arguments that all compiled operators begin with."""
        self._check_version()
        sizes = map(_int, (self.n, self.pixels, self.channels, self.ld))
        return (_pointer(self.data), *sizes, *_pointers(self.correction))

    def _compiled(self, name: str) -> Callable[..., None] | None:
        """The compiled operator for this type of activations; None without a compiler."""
        compiled = library()
        if compiled is None:
            return None
        return getattr(compiled, f"qdiff_{name}_{str(self.data.dtype).removeprefix('torch.')}")

    def plain(self) -> Tensor:
        """The corrected values, float32 [n, pixels, channels]."""
        self._check_version()
        x = self.data.as_strided((self.n, self.pixels, self.channels), (self.pixels * self.ld, self.ld, 1)).float()
        if self.correction is None:
            return x
        coef, sums = self.correction
        return x - coef * sums[..., None]

    def _mapped(self, affine: Affine | None, silu: bool) -> Tensor:
        """`values` in float32, without a compiler."""
        x = self.plain() if affine is None else self.plain() * affine[0][:, None] + affine[1][:, None]
        return F.silu(x) if silu else x

    def stats(self, shift: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Compute the statistics of a GroupNorm.

        Args:
            shift: [n, channels], added to the values first; None: 0.
            groups: the number of groups of channels.
            eps: added to the variance.

        Returns:
            Mean and 1 / standard deviation, float32 [n, groups] each.
        """
        if (compiled := self._compiled("stats")) is None:
            x = self.plain() if shift is None else self.plain() + shift[:, None]
            variance, mean = torch.var_mean(x.unflatten(2, (groups, -1)).double(), dim=(1, 3), unbiased=False)
            return mean.float(), (variance + eps).rsqrt().float()
        mean, rstd = torch.empty(self.n, groups), torch.empty(self.n, groups)
        compiled(
            *self._arguments(),
            _pointer(shift),
            _int(groups),
            ctypes.c_double(eps),
            _pointer(mean),
            _pointer(rstd),
            ctypes.c_int(torch.get_num_threads()),
        )
        return mean, rstd

    def quantize(self, affine: Affine | None, silu: bool, grid: IntegerGrid) -> tuple[list[Tensor], Tensor]:
        """Quantize silu(a * value + b).

        Args:
            affine: (a, b); None: no affine map.
            silu: whether SiLU is applied.
            grid: the integers.

        Returns:
            The bytes of the integers, uint8 or int8 [n, pixels, channels] each, the lower ones first. And the sums of
            the integers over the channels, int32 [n, pixels].
        """
        if (compiled := self._compiled("quantize")) is None:
            return self._quantize(affine, silu, grid)
        dtypes = (torch.uint8, torch.uint8) if grid.dtype == torch.uint16 else (grid.dtype,)
        out = [torch.empty(self.n, self.pixels, self.channels, dtype=dtype) for dtype in dtypes]
        sums = torch.empty(self.n, self.pixels, dtype=torch.int32)
        compiled(
            *self._arguments(),
            *_pointers(affine),
            ctypes.c_int(silu),
            _pointer(grid.divisor),
            *(ctypes.c_float(value) for value in (grid.scale, grid.low, grid.high, grid.zero)),
            _pointer(out[0]),
            _pointer(out[1] if len(out) == 2 else None),
            _pointer(sums),
            ctypes.c_int(torch.get_num_threads()),
        )
        return out, sums

    def _quantize(self, affine: Affine | None, silu: bool, grid: IntegerGrid) -> tuple[list[Tensor], Tensor]:
        """`quantize` without a compiler."""
        x = self._mapped(affine, silu)
        x = x if grid.divisor is None else x / grid.divisor
        q = (x / grid.scale).round_().clamp_(grid.low, grid.high).add_(grid.zero).to(torch.int32)
        sums = q.sum(2, dtype=torch.int32)
        if grid.dtype == torch.uint16:
            return [(q & 255).to(torch.uint8), (q >> 8).to(torch.uint8)], sums
        return [q.to(grid.dtype)], sums

    def values(self, affine: Affine | None, silu: bool, other: Tensor | None = None) -> Tensor:
        """Compute silu(a * value + b) + other.

        Args:
            affine: (a, b); None: no affine map.
            silu: whether SiLU is applied.
            other: [n, pixels, channels] in the type of `data`; None: nothing is added.

        Returns:
            A new contiguous tensor [n, pixels, channels] in the type of `data`.
        """
        if (compiled := self._compiled("values")) is None:
            x = self._mapped(affine, silu)
            return (x if other is None else x + other).to(self.data.dtype).clone(memory_format=torch.contiguous_format)
        out = torch.empty(self.n, self.pixels, self.channels, dtype=self.data.dtype)
        compiled(
            *self._arguments(),
            *_pointers(affine),
            ctypes.c_int(silu),
            _pointer(other),
            _pointer(out),
            ctypes.c_int(torch.get_num_threads()),
        )
        return out
