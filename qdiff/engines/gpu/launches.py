"""The launches of the Triton kernels as custom operators of PyTorch.

A custom operator can be traced, counted by a dispatch mode and run on the meta device, which a bare launch cannot.
`traffic.py` says what each of them moves.

Tiles come from `product_tile`, a function of shape and card alone. They do not change a bit of a result.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from qdiff import quantizers as Q
from qdiff.engines.gpu import kernels

CHANNEL_MULTIPLE = 32  # of stored bytes: the shortest sum of the matrix instructions for int8
NIBBLE_CHANNELS = 2 * CHANNEL_MULTIPLE  # of the input, in a block of a packed weight
MAX_HEAD = 256  # channels of an attention head, at most: more of them do not fit into the registers of a block
SUM_LIMIT = 2**31 // 128**2  # products of signed bytes in a sum that cannot leave int32 before it is corrected
MULTIPROCESSORS = 108  # of an A100, which the rules for tiles are made for
LARGEST = 2**31  # what a kernel reads or writes has fewer elements, because its offsets are 32 bits wide
DTYPES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}


@dataclass(frozen=True)
class ByteFormat:
    """How the integers of an activation quantizer are stored in bytes.

    Args:
        n_bits: the width of the integers, 2 to 16.
        symmetric: whether the integers are signed.
    """

    n_bits: int
    symmetric: bool

    @property
    def wide(self) -> bool:
        """Whether an integer takes two bytes."""
        return self.n_bits > 8

    @property
    def room(self) -> bool:
        """See `kernels.stored_zero`."""
        return 8 < self.n_bits < 16

    @property
    def offset(self) -> int:
        """What is added to an integer before it is stored; bytes of wide integers are 128 less once more."""
        return (2**15 if self.symmetric else 0) if self.wide else (0 if self.symmetric else -128)

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        return Q.integer_range(self.n_bits, self.symmetric)

    @property
    def terms(self) -> tuple[int, ...]:
        """The terms whose sum a product is."""
        return (kernels.HIGH, kernels.LOW) if self.wide else (kernels.ONE_BYTE,)

    def stored_zeros(self, zero: int) -> list[int]:
        """The zero point of each term's bytes, for a zero point of the quantizer."""
        stored = zero + self.offset
        if not self.wide:
            return [stored]
        stored += (128 - stored) % 256 if self.room else 0
        return [(stored >> 8) - 128, (stored & 255) - 128]


@dataclass(frozen=True)
class Tile:
    """How `product_kernel` is cut: rows, columns and depth of a block, parts of the sums, warps and stages."""

    rows: int
    columns: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


def product_tile(rows: int, columns: int, channels: int, taps: int, capability: int) -> Tile:
    """Choose the tile of a product by its shape.

    Large blocks load less, but every multiprocessor should have one. Where even small blocks leave most of them idle,
    the sums are split. Not measured on any card yet.

    Args:
        rows: rows of the result.
        columns: columns of the result.
        channels: channels of the bytes, a multiple of 32.
        taps: pixels of the kernel.
        capability: of the card, for example 80.
    """
    depth = 128 if channels % 128 == 0 else 64 if channels % 64 == 0 else 32
    wide = 64 if columns > 32 else 32
    # with 128 columns, sm_90's matrix instructions leave too few registers
    largest = (128, 128) if capability < 90 and columns > 64 else (128, wide)
    for height, width in (largest, (64, wide)):
        blocks = triton.cdiv(rows, height) * triton.cdiv(columns, width)
        if blocks >= MULTIPROCESSORS:
            return Tile(height, width, min(depth, 64) if height * width > 64 * 64 else depth, 1, _warps(height, width))
    height, width = 64 if rows > 32 else 32, wide
    blocks = triton.cdiv(rows, height) * triton.cdiv(columns, width)
    steps = taps * channels // depth
    splits = 1 if blocks >= MULTIPROCESSORS // 2 else min(MULTIPROCESSORS // blocks, 8, max(1, steps // 8))
    return Tile(height, width, depth, splits, _warps(height, width))


def _warps(height: int, width: int) -> int:
    return 8 if height * width >= 128 * 128 else 4


def capability_of(x: Tensor) -> int:
    """The compute capability of a tensor's card, for example 86; 80 for tensors that are on none."""
    if x.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the card of `x`."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """`x`, or a tensor that stands in for it where a kernel does not read it."""
    return other if x is None else x


# --- quantization ----------------------------------------------------------------------------------


def stored_channels(c: int, packed: bool = False) -> int:
    """The channels of the bytes of a product with `c` input channels; `packed`: its weight is packed."""
    multiple = NIBBLE_CHANNELS if packed else CHANNEL_MULTIPLE
    return triton.cdiv(c, multiple) * multiple


def stored_head(c: int) -> int:
    """The channels of the bytes of an attention with `c` channels a head."""
    return max(CHANNEL_MULTIPLE, triton.next_power_of_2(c))


def quantize_blocks(pixels: int, stored: int, layer_norm: bool) -> tuple[int, int]:
    """Pixels and channels of a block of `quantize_kernel`."""
    if layer_norm:
        block = triton.next_power_of_2(stored)
        return max(1, min(16, 2048 // block)), block  # with 4096 values, registers spill on sm_80
    block = min(64, triton.next_power_of_2(stored))
    return min(32, triton.next_power_of_2(pixels)), block


@torch.library.custom_op("qdiff::int8_quantize", mutates_args=())
def quantize(
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
) -> list[Tensor]:
    """Quantize factor silu(a x + b) / divisor to stored bytes.

    Args:
        x: [N, heads, H, W, C] with any strides; float32, float16 or bfloat16. With `geglu` [N, heads, H, W, 2 C].
        scale: the scale of each timestep group, float32 [G].
        zero: their zero points, float32 [G].
        group: the current group, int32 [1].
        n_bits: the width of the integers, 2 to 16.
        symmetric: whether the integers are signed.
        padding: what is added at the top, bottom, left and right.
        stored: the channels of the result, at least C.
        sums: whether the sums over the channels are computed too.
        a: float32 [N, C], or with `layer_norm` [C]; None: 1.
        b: of the shape of `a`.
        layer_norm: the eps of a LayerNorm over C, whose weight and bias are `a` and `b`; None: there is none.
        silu: whether SiLU follows.
        geglu: whether the values are multiplied by the GELU of the gates.
        divisor: float32 [C]; None: 1.
        factor: of all values.

    Returns:
        The (lower) bytes, int8 [N heads, H + ., W + ., stored]; with more than 8 bits the upper bytes; and with `sums`
        the sums of q - zero point over the channels for each of them, int32 [N heads, H + ., W + .].
    """
    form = ByteFormat(n_bits, symmetric)
    out = _quantized_like(x, form, padding, stored, sums)
    q = out[0]
    high = out[1] if form.wide else q
    totals = out[-(2 if form.wide else 1)] if sums else q
    _, heads, h, w, c = x.shape
    c //= 2 if geglu else 1
    images, height, width, _ = q.shape
    pixels, channels = quantize_blocks(height * width, stored, layer_norm is not None)
    grid = (triton.cdiv(height * width, pixels), images)
    with _on(x):
        kernels.quantize_kernel[grid](
            x, _or(a, scale), _or(b, scale), _or(divisor, scale), scale, zero, group,
            q, high, totals, out[-1] if sums else q,
            *x.stride(), heads, h, w, height, width, padding[0], padding[2], layer_norm or 0.0, factor,
            C=c, CP=stored, LOWEST=form.bounds[0], HIGHEST=form.bounds[1], OFFSET=form.offset,
            ROOM=form.room, WIDE=form.wide, AFFINE=a is not None and layer_norm is None,
            LAYER=layer_norm is not None, SILU=silu, GEGLU=geglu, DIVIDE=divisor is not None, SUMS=sums,
            BP=pixels, BC=channels, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    n_bits: int,
    symmetric: bool,
    padding: Sequence[int],
    stored: int,
    sums: bool,
    *_: Any,
    **__: Any,
) -> list[Tensor]:
    return _quantized_like(x, ByteFormat(n_bits, symmetric), padding, stored, sums)


def _quantized_like(x: Tensor, form: ByteFormat, padding: Sequence[int], stored: int, sums: bool) -> list[Tensor]:
    n, heads, h, w, _ = x.shape
    shape = (n * heads, h + padding[0] + padding[1], w + padding[2] + padding[3])
    count = 2 if form.wide else 1
    out = [torch.empty(*shape, stored, dtype=torch.int8, device=x.device) for _ in range(count)]
    return out + [torch.empty(shape, dtype=torch.int32, device=x.device) for _ in range(count if sums else 0)]


# --- products --------------------------------------------------------------------------------------


def output_shape(q: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Height and width of the result of a convolution of padded bytes."""
    sides = zip(q.shape[1:3], weight.shape[1:3], stride, dilation, strict=True)
    height, width = ((side - d * (k - 1) - 1) // s + 1 for side, k, s, d in sides)
    return height, width


def tile_of(q: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], packed: bool) -> Tile:
    """The tile of a product; see `product` for the arguments. `packed`: its weight is."""
    height, width = output_shape(q, weight, stride, dilation)
    taps = weight.shape[1] * weight.shape[2]
    tile = product_tile(len(q) * height * width, len(weight), q.shape[3], taps, capability_of(q))
    return replace(tile, depth=NIBBLE_CHANNELS) if packed else tile


def pack_nibbles(integers: Tensor) -> Tensor:
    """Pack integers of 4 bits as `product` reads them: two in a byte, those that are 32 channels apart.

    Args:
        integers: 0 to 15, any integer type [OC, KH, KW, C], where C is a multiple of 64.

    Returns:
        uint8 [OC, KH, KW, C / 2].
    """
    low, high = integers.unflatten(3, (-1, 2, NIBBLE_CHANNELS // 2)).to(torch.uint8).unbind(4)
    return (low | high << 4).flatten(3)


def unpack_nibbles(weight: Tensor) -> Tensor:
    """The integers of `pack_nibbles`, uint8."""
    halves = weight.unflatten(3, (-1, NIBBLE_CHANNELS // 2))
    return torch.stack((halves & 15, halves >> 4), dim=4).flatten(3)


@torch.library.custom_op("qdiff::int8_product", mutates_args=())
def product(
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
) -> Tensor:
    """Convolve stored bytes, dequantize the sums, and add bias, shift and residual.

    Args:
        q: padded bytes [N, HP, WP, C]; those of a linear map are [1, 1, rows, C].
        weight: int8 [OC, KH, KW, C]; with `nibble_zero` uint8 [OC, KH, KW, C / 2], see `pack_nibbles`.
        weight_sums: the sums of the weight for each output channel, int32 [OC].
        scale: the scale of the weight, float32 [OC].
        x_scale: see `quantize`, as for the next four.
        x_zero: see there.
        group: see there.
        n_bits: see there.
        symmetric: see there.
        term: which bytes of the integers `q` holds, see `ByteFormat.terms`.
        stride: two numbers.
        dilation: two numbers.
        dtype: the type of the result.
        sums: the sums of `q` less its zero point; needed with `weight_zero`.
        weight_zero: int32 [OC], what is missing in `weight` to be the integers less their zero point; None: nothing.
        nibble_zero: int8 [OC], the zero points of integers of 4 bits that are packed; None: a byte for each integer.
        bias: float32 [OC].
        shift: [N, OC].
        residual: [N, OH, OW, OC], contiguous.

    Returns:
        [N, OH, OW, OC].
    """
    return launch_product(
        tile_of(q, weight, stride, dilation, nibble_zero is not None), q, weight, weight_sums, scale, x_scale, x_zero,
        group, n_bits, symmetric, term, stride, dilation, dtype, sums, weight_zero, nibble_zero, bias, shift, residual,
    )  # fmt: skip


def launch_product(
    tile: Tile,
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
) -> Tensor:
    """`product` with a given tile.

    Raises:
        ValueError: the weight is packed for blocks of another depth.
    """
    if nibble_zero is not None and tile.depth != NIBBLE_CHANNELS:
        raise ValueError(f"a packed weight needs tiles of depth {NIBBLE_CHANNELS}, found {tile.depth}")
    form = ByteFormat(n_bits, symmetric)
    n, hp, wp, c = q.shape
    oc, kh, kw, _ = weight.shape
    height, width = output_shape(q, weight, stride, dilation)
    y = torch.empty(n, height, width, oc, dtype=dtype, device=q.device)
    rows = n * height * width
    tensors: tuple[Tensor, ...] = (
        _or(sums, group),
        weight_sums,
        _or(weight_zero, group),
        scale,
        _or(bias, scale),
        _or(shift, scale),
    )
    tensors += (_or(residual, scale), x_scale, x_zero, group, y)
    sizes = (n, hp, wp, height, width, oc)
    common = {
        "KH": kh, "KW": kw, "SH": stride[0], "SW": stride[1], "DH": dilation[0], "DW": dilation[1],
        "OFFSET": form.offset, "ROOM": form.room, "TERM": term, "CORRECT": weight_zero is not None,
        "BIAS": bias is not None, "SHIFT": shift is not None, "RESIDUAL": residual is not None,
        "SPLITS": tile.splits, "enable_fp_fusion": False,
    }  # fmt: skip
    scratch = torch.empty(tile.splits, rows, oc, dtype=torch.int32, device=q.device) if tile.splits > 1 else y
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(oc, tile.columns), tile.splits)
    with _on(q):
        kernels.product_kernel[grid](
            q, tensors[0], weight, _or(nibble_zero, scale), *tensors[1:], scratch, *sizes, C=c, **common,
            NIBBLES=nibble_zero is not None, BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUPED=8,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if tile.splits > 1:
            grid = (triton.cdiv(rows, FINISH[0]), triton.cdiv(oc, FINISH[1]))
            kernels.finish_kernel[grid](scratch, *tensors, *sizes, **common, BM=FINISH[0], BN=FINISH[1])
    return y


FINISH = (16, 64)  # the block of `finish_kernel`


@product.register_fake
def _(
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
    *_: Any,
    **__: Any,
) -> Tensor:
    return torch.empty(len(q), *output_shape(q, weight, stride, dilation), len(weight), dtype=dtype, device=q.device)


# --- normalization ---------------------------------------------------------------------------------


def _norm_blocks(pixels: int, width: int) -> tuple[int, int]:
    """Pixels and channels of a block of `norm_kernel`. The sums depend on it: it must not be tuned."""
    channels = triton.next_power_of_2(width)
    return min(triton.next_power_of_2(pixels), max(16, 4096 // channels)), channels


@torch.library.custom_op("qdiff::group_norm_map", mutates_args=())
def group_norm_map(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """A GroupNorm as a x + b.

    Args:
        x: [N, H, W, C] with any strides.
        weight: float32 [C].
        bias: float32 [C].
        groups: the number of groups of channels.
        eps: added to the variance.

    Returns:
        (a, b), float32 [N, C] each.
    """
    n, h, w, c = x.shape
    a, b = (torch.empty(n, c, dtype=torch.float32, device=x.device) for _ in range(2))
    pixels, channels = _norm_blocks(h * w, c // groups)
    with _on(x):
        kernels.norm_kernel[(groups, n)](
            x, weight, bias, a, b, *x.stride(), w, c, eps,
            PIXELS=h * w, WIDTH=c // groups, BP=pixels, BC=channels, enable_fp_fusion=False,
        )  # fmt: skip
    return a, b


@group_norm_map.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    a, b = (torch.empty(len(x), x.shape[3], dtype=torch.float32, device=x.device) for _ in range(2))
    return a, b


# --- attention -------------------------------------------------------------------------------------

KEYS = 64  # keys of a block. The sums of a softmax depend on it: it must not be tuned


def query_block(stored: int, wide: bool) -> int:
    """Queries of a block; two sums for each of 64 channels or more leave too few registers for 64 queries."""
    return 32 if wide and stored >= 64 else 64


def _key_stages(stored: int, keys: int) -> int:
    """How many blocks of keys are on their way at a time; loading few small ones ahead spills registers."""
    return 1 if keys <= 2 * KEYS and stored <= 64 else 3


@torch.library.custom_op("qdiff::int8_attention", mutates_args=())
def attention(
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
) -> Tensor:
    """softmax(factor q k^T) v with quantized operands and probabilities.

    Args:
        q: bytes [B, T, C to a power of 2], where B is N heads; the additional channels hold the zero point.
        k: bytes [B, L, .].
        v: bytes [B, L, .].
        scales: those of q, k, v and the probabilities, float32 [G] each.
        zeros: their zero points.
        group: see `quantize`.
        n_bits: the widths of the four; 8 at most but for the probabilities.
        symmetric: whether the integers of the four are signed.
        heads: the number of heads.
        width: the channels of a head.
        factor: of the logits.
        dtype: the type of the result.

    Returns:
        [N, T, heads, width].
    """
    forms = [ByteFormat(*pair) for pair in zip(n_bits, symmetric, strict=True)]
    b, t, stored = q.shape
    y = torch.empty(b // heads, t, heads, width, dtype=dtype, device=q.device)
    rows = query_block(stored, forms[3].wide)
    qparams = [part for pair in zip(scales, zeros, strict=True) for part in pair]
    with _on(q):
        kernels.attention_kernel[(triton.cdiv(t, rows), b)](
            q, k, v, y, *qparams, group, t, heads, factor,
            L=k.shape[1], D=width, DP=stored, Q_OFFSET=forms[0].offset, K_OFFSET=forms[1].offset,
            V_OFFSET=forms[2].offset, P_OFFSET=forms[3].offset, P_LOWEST=forms[3].bounds[0],
            P_HIGHEST=forms[3].bounds[1], WIDE=forms[3].wide, ROOM=forms[3].room, BM=rows, BL=KEYS,
            num_warps=4 if stored <= 128 else 8, num_stages=_key_stages(stored, k.shape[1]), enable_fp_fusion=False,
        )  # fmt: skip
    return y


@attention.register_fake
def _(
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
) -> Tensor:
    return torch.empty(len(q) // heads, q.shape[1], heads, width, dtype=dtype, device=q.device)
