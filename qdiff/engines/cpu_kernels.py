"""The fused pointwise operators: compiled once where there is a C++ compiler, plain PyTorch where there is none."""

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

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled operators, from the cache or compiled now (seconds); None, with one log line, without a compiler."""
    compiler = shlex.split(
        os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""
    )  # "ccache g++"
    if not compiler or not shutil.which(compiler[0]):
        log.warning("integer engine: no C++ compiler found: the pointwise work is not fused")
        return None
    variants = [[*FLAGS, "-mprefer-vector-width=512", "-fopenmp"], [*FLAGS, "-fopenmp"], FLAGS]
    key = hashlib.sha256(
        SOURCE.read_bytes() + repr((compiler, variants, platform.machine(), _processor())).encode()
    ).hexdigest()[:16]
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdiff" / f"kernels-{key}.so"
        if not path.is_file():
            _compile(compiler, variants, path)
        _keep_memory()
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home folder
        log.warning("integer engine: %s: the pointwise work is not fused", str(error).splitlines()[0])
        return None


def _keep_memory() -> None:
    """Let the C library keep the memory of large tensors instead of giving it back, and faulting it in again, at every operation."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not the GNU C library
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def _processor() -> str:
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def _compile(compiler: list[str], variants: list[list[str]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "kernels.so"
        for flags in variants:
            result = subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
            if result.returncode == 0:
                made.replace(path)
                return
    raise OSError(f"{shlex.join(compiler)} failed: {(result.stderr.splitlines() or ['no message'])[0]}")


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


class ChannelsLastView:
    """Activations as the operators see them: [n, pixels, channels], float32 or bfloat16, with `ld` values from pixel to pixel.

    All work is done in float32. coef [channels], with sums [n, pixels]: their product is subtracted from each value
    (weight zero points). version: that of `data`, where it is a tensor of the network, which could be changed in place.
    """

    version: int | None = None

    def __init__(
        self,
        data: Tensor,
        n: int,
        pixels: int,
        channels: int,
        ld: int,
        coef: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        self.data, self.n, self.pixels, self.channels, self.ld, self.coef, self.sums = (
            data,
            n,
            pixels,
            channels,
            ld,
            coef,
            sums,
        )

    def _check(self) -> None:
        if self.version is not None and self.data._version != self.version:
            raise RuntimeError(
                "an activation was changed in place between its GroupNorm and the product after it: "
                "the integer engine cannot follow that, expected --engine simulated"
            )

    def _geometry(self) -> tuple:
        self._check()
        sizes = map(_int, (self.n, self.pixels, self.channels, self.ld))
        return (_pointer(self.data), *sizes, _pointer(self.coef), _pointer(self.sums))

    def _compiled(self, name: str) -> Callable[..., None] | None:
        """The operator for this type of activations."""
        return (found := library()) and getattr(found, f"qdiff_{name}_{str(self.data.dtype).removeprefix('torch.')}")

    def plain(self) -> Tensor:
        """[n, pixels, channels] in float32, corrected."""
        self._check()
        x = self.data.as_strided((self.n, self.pixels, self.channels), (self.pixels * self.ld, self.ld, 1)).float()
        return x if self.coef is None else x - self.coef * self.sums[..., None]

    def _mapped(self, a: Tensor | None, b: Tensor | None, silu: bool) -> Tensor:
        """`values` in float32, without a compiler."""
        x = self.plain() if a is None else self.plain() * a[:, None] + b[:, None]
        return F.silu(x) if silu else x

    def stats(self, shift: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """(mean, 1 / standard deviation) [n, groups] of the values plus `shift` [n, channels]."""
        if (compiled := self._compiled("stats")) is None:
            x = self.plain() if shift is None else self.plain() + shift[:, None]
            variance, mean = torch.var_mean(x.unflatten(2, (groups, -1)).double(), dim=(1, 3), unbiased=False)
            return mean.float(), (variance + eps).rsqrt().float()
        mean, rstd = torch.empty(self.n, groups), torch.empty(self.n, groups)
        compiled(
            *self._geometry(),
            _pointer(shift),
            _int(groups),
            ctypes.c_double(eps),
            _pointer(mean),
            _pointer(rstd),
            ctypes.c_int(torch.get_num_threads()),
        )
        return mean, rstd

    def quantize(
        self,
        a: Tensor | None,
        b: Tensor | None,
        silu: bool,
        scale: float,
        low: float,
        high: float,
        offset: float,
        dtype: torch.dtype = torch.uint8,
    ) -> tuple[Tensor, Tensor]:
        """Integers [n, pixels, channels], uint8 or int8, and their sums [n, pixels] in int32.

        They are clamp(round(f(value) / delta), low, high) + offset, with f as in `values`.
        """
        if (compiled := self._compiled("quantize")) is None:
            out = (self._mapped(a, b, silu) / scale).round_().clamp_(low, high).add_(offset).to(dtype)
            return out, out.sum(2, dtype=torch.int32)
        out = torch.empty(self.n, self.pixels, self.channels, dtype=dtype)
        totals = torch.empty(self.n, self.pixels, dtype=torch.int32)
        numbers = (ctypes.c_float(value) for value in (scale, low, high, offset))
        compiled(
            *self._geometry(),
            _pointer(a),
            _pointer(b),
            ctypes.c_int(silu),
            *numbers,
            _pointer(out),
            _pointer(totals),
            ctypes.c_int(torch.get_num_threads()),
        )
        return out, totals

    def values(self, a: Tensor | None, b: Tensor | None, silu: bool, other: Tensor | None = None) -> Tensor:
        """a * value + b (per image and channel), then SiLU, then plus `other` (of the same type): new [n, pixels, channels]."""
        if (compiled := self._compiled("values")) is None:
            x = self._mapped(a, b, silu)
            return (x if other is None else x + other).to(self.data.dtype).clone(memory_format=torch.contiguous_format)
        out = torch.empty(self.n, self.pixels, self.channels, dtype=self.data.dtype)
        compiled(
            *self._geometry(),
            _pointer(a),
            _pointer(b),
            ctypes.c_int(silu),
            _pointer(other),
            _pointer(out),
            ctypes.c_int(torch.get_num_threads()),
        )
        return out
