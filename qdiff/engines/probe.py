"""What oneDNN's int8 operators compute exactly on this processor.

Processors with VNNI or AMX add products of bytes in 32 bits. Others add pairs of them in 16 bits, with saturation:
255 * |w| + 255 * |w| stays exact up to |w| = 64. `ONEDNN_MAX_CPU_ISA=AVX2` emulates such a processor for oneDNN.
"""

import os
import platform
from functools import cache
from typing import Literal

import torch

Kind = Literal["AVX2", "VNNI", "AMX"]
LARGEST_BYTE, LARGEST_IN_16_BITS = 128, 64  # of |w|; two products 255 * 64 are below 2^15
NO_VNNI = "on a processor without VNNI"


@cache
def why_unavailable() -> str | None:
    """The reason why the integer engine cannot run on this machine; None if it can."""
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return "this build of PyTorch has no oneDNN"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"oneDNN's int8 operators need an x86 processor, found {platform.machine()}"
    return None if largest_exact_weight() else "oneDNN's 8-bit products are wrong on this processor"


@cache
def largest_exact_weight() -> int:
    """The largest |w| of int8 weights w whose products with bytes are exact: 128, 64 without VNNI, 0 if none is."""
    return next(
        (w for w in (LARGEST_BYTE, LARGEST_IN_16_BITS) if _products_are_right(-w) and _products_are_right(w - 1)), 0
    )


@cache
def attention_is_exact() -> bool:
    """Whether `torch._int_mm`, which multiplies attentions, is exact for all int8 operands."""
    return all(
        bool(
            (torch._int_mm(*(torch.full((64, 64), w, dtype=torch.int8) for w in pair)) == 64 * pair[0] * pair[1]).all()
        )
        for pair in ((127, 127), (127, -128), (-128, -128))
    )


def kind() -> Kind:
    """The kind of instructions that oneDNN multiplies bytes with."""
    if largest_exact_weight() < LARGEST_BYTE:
        return "AVX2"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    amx = torch.cpu._is_amx_tile_supported() and (limit in ("ALL", "DEFAULT") or "AMX" in limit)
    return "AMX" if amx else "VNNI"


@cache
def processor() -> str:
    """The name of the processor; empty if the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _products_are_right(w: int) -> bool:
    """Whether 64 products 255 * w add up correctly, in a convolution and in a linear layer."""
    q = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    weight = torch.full((64, 64, 1, 1), w, dtype=torch.int8)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    end: tuple = (1.0, 0, torch.float32, "none", [], "")
    packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *geometry)
    y = torch.ops.onednn.qconv2d_pointwise(q, 1.0, 0, packed, ones, zeros, None, *geometry, *end)
    packed = torch.ops.onednn.qlinear_prepack(weight.flatten(1), None)
    rows = q.permute(0, 2, 3, 1).reshape(-1, 64)
    z = torch.ops.onednn.qlinear_pointwise(rows, 1.0, 0, packed, ones, zeros, None, *end)
    return bool((y == 64 * 255 * w).all() and (z == 64 * 255 * w).all())
