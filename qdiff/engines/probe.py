"""Whether this machine can run the CPU engine, which needs oneDNN's int8 operators without saturating sums."""

from functools import cache

import torch


@cache
def why_unavailable() -> str | None:
    """The reason why the integer engine cannot run on this machine; None if it can."""
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return "this build of PyTorch has no oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "the processor has no VNNI, without which 8-bit products saturate"
    if not _largest_products_are_right():
        return "oneDNN's 8-bit products saturate here (no VNNI, or ONEDNN_MAX_CPU_ISA excludes it)"
    return None


def _largest_products_are_right() -> bool:
    """Whether 64 products 255 * 127 add up correctly; operators with 16-bit intermediate sums saturate."""
    q = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    weight = torch.full((64, 64, 1, 1), 127, dtype=torch.int8)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *geometry)
    y = torch.ops.onednn.qconv2d_pointwise(
        q, 1.0, 0, packed, ones, zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y == 64 * 255 * 127).all())
