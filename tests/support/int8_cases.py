"""Cases of the operators of the integer engine on CUDA, the same on every device.

TRITON_INTERPRET=1 python -m tests.support.int8_cases FILE     # what Triton's interpreter gives, on the CPU
"""

import itertools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qdiff.engines.gpu import launches

NO_PADDING = (0, 0, 0, 0)


class _Random:
    """Random tensors that are the same on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def constant(self, *values: float) -> Tensor:
        return torch.tensor(values, device=self.device)


def _group(random: _Random) -> Tensor:
    return torch.ones(1, dtype=torch.int32, device=random.device)


@torch.no_grad()
def exact_cases(device: torch.device) -> dict[str, Tensor]:
    """Products with their epilogues, which are the same in every bit."""
    random, results = _Random(device), {}
    shapes = (
        (2, 10, 10, 64, 96, 3, 1),
        (1, 9, 11, 32, 40, 3, 2),
        (1, 1, 200, 256, 320, 1, 1),
        (2, 10, 10, 320, 64, 3, 1),
    )
    for index, (n, h, w, c, oc, k, stride) in enumerate(shapes):
        for wide, dtype in itertools.product((False, True), (torch.float16, torch.float32)):
            q, weight = random.integers(-128, 128, n, h, w, c), random.integers(-15, 16, oc, k, k, c)
            sums = random.integers(-20_000, 20_000, n, h, w, dtype=torch.int32) if wide else None
            missing = random.integers(-90, 90, oc, dtype=torch.int32) if wide else None
            height, width = (h - k) // stride + 1, (w - k) // stride + 1
            results[f"product {index} {wide} {dtype}"] = launches.product(
                q, weight, weight.flatten(1).sum(1, dtype=torch.int32), random.normal(oc).abs(),
                random.constant(0.5, 0.013), random.constant(3.0, 91.0), _group(random), 8, False, 0,
                (stride, stride), (1, 1), dtype, sums=sums, weight_zero=missing, bias=random.normal(oc),
                shift=random.normal(n, oc), residual=random.normal(n, height, width, oc).to(dtype),
            )  # fmt: skip
        results[f"packed product {index}"] = launches.product(
            random.integers(-128, 128, n, h, w, stored := launches.stored_channels(c, packed=True)),
            launches.pack_nibbles(random.integers(0, 16, oc, k, k, stored)),
            random.integers(-99, 99, oc, dtype=torch.int32), random.normal(oc).abs(),
            random.constant(0.5, 0.013), random.constant(3.0, 91.0), _group(random), 8, False, 0,
            (stride, stride), (1, 1), torch.float16, nibble_zero=random.integers(0, 16, oc), bias=random.normal(oc),
        )  # fmt: skip
    return results


@torch.no_grad()
def rounded_cases(device: torch.device) -> dict[str, Tensor]:
    """Quantized values after functions that a card approximates: at most one step off, and rarely."""
    random, results = _Random(device), {}
    qparams = (random.constant(0.5, 0.02), random.constant(3.0, 100.0), _group(random))
    x = random.normal(2, 1, 9, 7, 64)
    a, b = launches.group_norm_map(x[:, 0], random.normal(64), random.normal(64), 8, 1e-5)
    results["silu"] = launches.quantize(x, *qparams, 8, False, (1, 1, 1, 1), 64, False, a=a, b=b, silu=True)[0]
    gates = random.normal(1, 1, 1, 50, 192)
    results["geglu"] = launches.quantize(gates, *qparams, 8, False, NO_PADDING, 96, False, geglu=True)[0]
    tokens, weight, bias = random.normal(1, 1, 1, 50, 320), random.normal(320), random.normal(320)
    results["layer norm"] = launches.quantize(
        tokens, *qparams, 8, False, NO_PADDING, 320, False, a=weight, b=bias, layer_norm=1e-5
    )[0]
    return results


@torch.no_grad()
def attention_cases(device: torch.device) -> dict[str, Tensor]:
    """Attentions, which differ where a probability is one step off."""
    random, results = _Random(device), {}
    for width, bits in itertools.product((40, 64, 160), (8, 16)):
        q, k, v = (random.integers(-128, 128, 4, t, launches.stored_head(width)) for t in (70, 77, 77))
        scales = [random.constant(1.0, s) for s in (0.02, 0.02, 0.03, 1 / (2**bits - 1))]
        zeros = [random.constant(0.0, z) for z in (128.0, 120.0, 131.0, 0.0)]
        results[f"attention {width} {bits}"] = launches.attention(
            q, k, v, scales, zeros, _group(random), [8, 8, 8, bits], [False] * 4, 2, width, width**-0.5, torch.float32
        )
    return results


def all_cases(device: torch.device) -> dict[str, Tensor]:
    """The results of all cases, on the CPU."""
    cases = exact_cases(device) | rounded_cases(device) | attention_cases(device)
    return {name: result.cpu().contiguous() for name, result in cases.items()}


if __name__ == "__main__":
    save_file(all_cases(torch.device("cpu")), Path(sys.argv[1]))
