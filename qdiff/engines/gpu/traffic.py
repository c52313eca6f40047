"""What the launches of the integer engine on CUDA move between memory and the card's processors.

For each operator of `launches.py` a function of the same arguments states its `Traffic`. Tests compare it with the
loads and stores of Triton's interpreter, and the estimates in the documentation are sums of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from qdiff.engines.gpu.launches import (
    DTYPES,
    FINISH,
    ByteFormat,
    output_shape,
    quantize_blocks,
    query_block,
    tile_of,
)


@dataclass(frozen=True)
class Traffic:
    """What one operator moves between memory and the card's processors.

    Attributes:
        launches: kernels that are launched.
        loads: bytes that all programs load, those that several of them load counted each time; most of these come from
            the cache.
        stores: bytes that all programs store.
        distinct: bytes that are loaded or stored at least once: the traffic if the cache holds all that is read again.
    """

    launches: int
    loads: int
    stores: int
    distinct: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.launches + other.launches,
            self.loads + other.loads,
            self.stores + other.stores,
            self.distinct + other.distinct,
        )


def quantize_traffic(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    n_bits: int,
    symmetric: bool,
    padding: Sequence[int],
    stored: int,
    sums: bool,
    a: Tensor | None = None,
    b: Tensor | None = None,
    layer_norm: float | None = None,
    silu: bool = False,
    geglu: bool = False,
    divisor: Tensor | None = None,
    factor: float = 1.0,
) -> Traffic:
    """The traffic of `launches.quantize`; see there for the arguments."""
    n, heads, h, w, c = x.shape
    form = ByteFormat(n_bits, symmetric)
    width = c // (2 if geglu else 1)
    height, wide = h + padding[0] + padding[1], w + padding[2] + padding[3]
    pixels, _ = quantize_blocks(height * wide, stored, layer_norm is not None)
    programs = triton.cdiv(height * wide, pixels) * n * heads
    values = x.numel() * x.element_size()
    vectors = 4 * width * sum(part is not None for part in (a, b, divisor))
    written = n * heads * height * wide * (stored + (4 if sums else 0)) * (2 if form.wide else 1)
    read = sum(4 * part.numel() for part in (a, b, divisor) if part is not None)
    return Traffic(1, values + programs * (vectors + 12), written, values + read + 12 + written)


def product_traffic(
    q: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    scale: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    group: Tensor,
    n_bits: int,
    symmetric: bool,
    term: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    sums: Tensor | None = None,
    weight_zero: Tensor | None = None,
    nibble_zero: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Traffic:
    """The traffic of `launches.product`; see there for the arguments."""
    packed = nibble_zero is not None
    tile = tile_of(q, weight, stride, dilation, packed)
    height, width = output_shape(q, weight, stride, dilation)
    oc, kh, kw, _ = weight.shape
    c = q.shape[3]
    rows = len(q) * height * width
    result = rows * oc * DTYPES[dtype]
    added = sum(
        part.numel() * part.element_size()
        for part in (sums, bias, shift, residual, weight_zero, nibble_zero)
        if part is not None
    )
    distinct = q.numel() + weight.numel() + 8 * oc + added + 12 + result
    blocks_m, blocks_n = triton.cdiv(rows, tile.rows), triton.cdiv(oc, tile.columns)
    share = triton.cdiv(kh * kw * c // tile.depth, tile.splits) * tile.splits
    share = min(share, kh * kw * c // tile.depth)  # what lies beyond the end is masked
    columns = tile.columns // 2 if packed else tile.columns  # in bytes of the weight for each input channel
    loads = blocks_m * blocks_n * share * tile.depth * (tile.rows + columns)
    loads += blocks_m * blocks_n * tile.splits * tile.columns if packed else 0
    stores = result
    if tile.splits > 1:
        partial = 4 * tile.splits * rows * oc
        distinct, stores, loads = distinct + 2 * partial, stores + partial, loads + partial
        block = FINISH
    else:
        block = (tile.rows, tile.columns)
    programs = triton.cdiv(rows, block[0]) * triton.cdiv(oc, block[1])
    vectors = 2 + (bias is not None) + (weight_zero is not None)
    field = 4 * kh * kw * block[0] if weight_zero is not None else 0
    shifts = block[0] * block[1] * shift.element_size() if shift is not None else 0
    loads += programs * (4 * block[1] * vectors + field + shifts + 12)
    loads += residual.numel() * residual.element_size() if residual is not None else 0
    return Traffic(2 if tile.splits > 1 else 1, loads, stores, distinct)


def group_norm_map_traffic(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Traffic:
    """The traffic of `launches.group_norm_map`; see there for the arguments."""
    n, _, _, c = x.shape
    values = x.numel() * x.element_size()
    return Traffic(1, values + 8 * n * c, 8 * n * c, values + 8 * c + 8 * n * c)


def attention_traffic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    group: Tensor,
    n_bits: Sequence[int],
    symmetric: Sequence[bool],
    heads: int,
    width: int,
    factor: float,
    dtype: torch.dtype,
) -> Traffic:
    """The traffic of `launches.attention`; see there for the arguments."""
    programs = triton.cdiv(q.shape[1], query_block(q.shape[2], n_bits[3] > 8)) * len(q)
    result = len(q) * q.shape[1] * width * DTYPES[dtype]
    keys = k.shape[1] * k.shape[2]
    distinct = q.numel() + k.numel() + v.numel() + 36 + result
    return Traffic(1, q.numel() + programs * (3 * keys + 36), result, distinct)


# what each operator moves, by its name; the functions take the arguments of the operator
TRAFFIC: dict[str, Callable[..., Traffic]] = {
    "int8_quantize": quantize_traffic,
    "int8_product": product_traffic,
    "group_norm_map": group_norm_map_traffic,
    "int8_attention": attention_traffic,
}
