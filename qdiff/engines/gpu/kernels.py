"""Triton kernels of the integer engine on CUDA.

Four kernels make up a quantized network: `quantize_kernel` turns activations into bytes and does the pointwise work
before a product (normalization, SiLU, GEGLU, smoothing, padding) in the same pass; `product_kernel` multiplies the
bytes, as a convolution or a linear map, and adds bias, time embedding and residual; `norm_kernel` reduces a GroupNorm
to a factor and an offset for each channel; `attention_kernel` computes an attention without its T x L matrix in memory.

Sums of integers are exact in int32, so tiles and splits of the sums cannot change a bit of a product. Sums of floats
(norms and softmax) run over blocks that are part of the function and must not be tuned. Loop bounds are compile-time
constants, which Triton's interpreter needs in the oldest release that is supported (3.6).

Bytes are stored signed. A quantizer with unsigned integers has 128 less in memory than in the checkpoint; integers of
9 to 16 bits are two bytes, each 128 less. `stored_zero` gives the zero point of what is stored.
"""

# the arguments of functions that Triton compiles have no types of Python
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

ONE_BYTE, HIGH, LOW = 0, 1, 2  # the terms of a product: bytes, or the upper and the lower bytes of wider integers
_HIGH, _LOW = tl.constexpr(HIGH), tl.constexpr(LOW)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers near it are whole, so adding it rounds half to even


@triton.jit
def stored_zero(zero, OFFSET: tl.constexpr, ROOM: tl.constexpr, TERM: tl.constexpr):
    """The zero point of stored bytes.

    ROOM: integers of two bytes have room to make the lower byte of the zero point 128, so that the bytes of values near
    0 are near those of the zero point, and the two terms do not cancel out.
    """
    z = zero.to(tl.int32) + OFFSET
    if ROOM:
        z += (128 - z) & 255
    if TERM == _HIGH:
        z = (z >> 8) - 128
    if TERM == _LOW:
        z = (z & 255) - 128
    return z


@triton.jit
def quantize_kernel(
    x, a, b, divisor, scale, zero, group, q, high, sums, high_sums,
    stride_n, stride_head, stride_h, stride_w, stride_c, heads, H, W, HP, WP, TOP, LEFT, eps, multiple,
    C: tl.constexpr, CP: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, OFFSET: tl.constexpr,
    ROOM: tl.constexpr, WIDE: tl.constexpr, AFFINE: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr,
    GEGLU: tl.constexpr, DIVIDE: tl.constexpr, SUMS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Quantize into a padded buffer [N * heads, HP, WP, CP], whose border and additional channels hold the zero point.

    x: any strides. a, b: [N, C] with AFFINE (a GroupNorm), [C] with LAYER (a LayerNorm, over all C, in one block of
    channels). GEGLU: x has 2 C channels, values and then gates. divisor: [C]. sums: [N * heads, HP, WP], the sums over
    the channels of q - zero point. A program writes BP pixels of one image or head.
    """
    at = tl.load(group)
    delta, z = tl.load(scale + at), tl.load(zero + at)
    image = tl.program_id(1)
    n = image // heads
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    row, column = pixel // WP - TOP, pixel % WP - LEFT
    exists = pixel < HP * WP
    inside = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    source = n.to(tl.int64) * stride_n + (image % heads) * stride_head + row * stride_h + column * stride_w
    target = (image * HP * WP + pixel).to(tl.int64) * CP
    empty = stored_zero(z, OFFSET, ROOM, _LOW if WIDE else 0)
    empty_high = stored_zero(z, OFFSET, ROOM, _HIGH)
    total = tl.zeros((BP,), dtype=tl.int32)
    high_total = tl.zeros((BP,), dtype=tl.int32)
    for start in range(0, CP, BC):
        c = start + tl.arange(0, BC)
        mask = inside[:, None] & (c < C)[None, :]
        v = tl.load(x + source[:, None] + (c * stride_c)[None, :], mask=mask, other=0.0).to(tl.float32)
        if AFFINE:
            factor = tl.load(a + n * C + c, mask=c < C, other=0.0)
            v = v * factor[None, :] + tl.load(b + n * C + c, mask=c < C, other=0.0)[None, :]
        if LAYER:
            mean = tl.sum(v, axis=1) / C
            centered = tl.where(mask, v - mean[:, None], 0.0)
            deviation = tl.sqrt_rn(tl.sum(centered * centered, axis=1) / C + eps)
            v = tl.div_rn(centered, deviation[:, None] + tl.zeros((BP, BC), tl.float32))
            v = v * tl.load(a + c, mask=c < C, other=0.0)[None, :] + tl.load(b + c, mask=c < C, other=0.0)[None, :]
        if SILU:
            v = v / (1.0 + tl.exp(-v))
        if GEGLU:
            gate = tl.load(x + source[:, None] + ((c + C) * stride_c)[None, :], mask=mask, other=0.0).to(tl.float32)
            v = v * (gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)))
        v = v * multiple
        if DIVIDE:
            v = tl.div_rn(v, tl.load(divisor + c, mask=c < C, other=1.0)[None, :] + tl.zeros((BP, BC), tl.float32))
        v = tl.div_rn(v, delta + tl.zeros((BP, BC), tl.float32))
        v = tl.minimum(tl.maximum(v, LOWEST - z - 1.0), HIGHEST - z + 1.0)
        v = (v + _ROUND) - _ROUND
        v = tl.minimum(tl.maximum(v, LOWEST - z), HIGHEST - z)
        stored = exists[:, None] & (c < CP)[None, :]
        if WIDE:
            integer = v.to(tl.int32) + stored_zero(z, OFFSET, ROOM, 0)
            low_byte = tl.where(mask, (integer & 255) - 128, empty)
            high_byte = tl.where(mask, (integer >> 8) - 128, empty_high)
            tl.store(high + target[:, None] + c[None, :], high_byte.to(tl.int8), mask=stored)
            high_total += tl.sum(high_byte - empty_high, axis=1)
        else:
            low_byte = tl.where(mask, v.to(tl.int32) + empty, empty)
        tl.store(q + target[:, None] + c[None, :], low_byte.to(tl.int8), mask=stored)
        total += tl.sum(low_byte - empty, axis=1)
    if SUMS:
        tl.store(sums + image * HP * WP + pixel, total, mask=exists)
        if WIDE:
            tl.store(high_sums + image * HP * WP + pixel, high_total, mask=exists)


@triton.jit
def _finish(
    acc, rm, rn, n, row, sums, weight_sums, weight_zero, scale, bias, shift, residual, x_scale, x_zero, group, y,
    M, OC, WP,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, OFFSET: tl.constexpr, ROOM: tl.constexpr,
    TERM: tl.constexpr, CORRECT: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Correct sums for the zero points, dequantize them, add bias, shift [N, OC] and residual [M, OC]; store them."""
    o = tl.minimum(rn, OC - 1)
    at = tl.load(group)
    acc -= (stored_zero(tl.load(x_zero + at), OFFSET, ROOM, TERM) * tl.load(weight_sums + o))[None, :]
    if CORRECT:
        field = tl.zeros_like(rm)
        for tap in range(0, KH * KW):
            field += tl.load(sums + row + tap // KW * DH * WP + tap % KW * DW)
        acc += field[:, None] * tl.load(weight_zero + o)[None, :]
    step = tl.load(x_scale + at)
    step = step * 256.0 if TERM == _HIGH else step
    out = acc.to(tl.float32) * (step * tl.load(scale + o))[None, :]
    where = rm.to(tl.int64)[:, None] * OC + rn[None, :]
    both = (rm < M)[:, None] & (rn < OC)[None, :]
    if BIAS:
        out += tl.load(bias + o)[None, :]
    if SHIFT:
        out += tl.load(shift + n[:, None] * OC + o[None, :]).to(tl.float32)
    if RESIDUAL:
        out += tl.load(residual + where, mask=both, other=0.0).to(tl.float32)
    tl.store(y + where, out.to(y.dtype.element_ty), mask=both)


@triton.jit
def product_kernel(
    q, sums, weight, nibble_zero, weight_sums, weight_zero, scale, bias, shift, residual, x_scale, x_zero, group, y,
    scratch,
    N, HP, WP, OH, OW, OC,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr,
    DW: tl.constexpr, OFFSET: tl.constexpr, ROOM: tl.constexpr, TERM: tl.constexpr, CORRECT: tl.constexpr,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, NIBBLES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Convolve padded bytes [N, HP, WP, C] with a weight [OC, KH, KW, C]; a linear map has HP = 1 and one tap.

    sum (q - zx) (w + zw), where weight_sums [OC] are the sums of w, and zw (weight_zero [OC]) is 0 unless CORRECT; then
    sums [N, HP, WP] holds the sums of q - zx. With SPLITS > 1, program_id(1) sums a part of the channels into scratch
    [SPLITS, M, OC], and `finish_kernel` does the rest. With NIBBLES the weight is uint8 [OC, KH, KW, C / 2]: in each
    block of BK channels a byte holds w + nibble_zero [OC] of channel i in its lower half, of channel i + BK / 2 in its
    upper half.
    """
    M = N * OH * OW
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(OC, BN)
    first = pid // (GROUPED * blocks_n) * GROUPED  # neighbors in time share the rows of q that are in the cache
    size = tl.minimum(blocks_m - first, GROUPED)
    rm = (first + (pid % (GROUPED * blocks_n)) % size) * BM + tl.arange(0, BM)
    rn = (pid % (GROUPED * blocks_n)) // size * BN + tl.arange(0, BN)
    m, o = tl.minimum(rm, M - 1), tl.minimum(rn, OC - 1)  # those beyond the end repeat the last one, and are not stored
    n, p = m // (OH * OW), m % (OH * OW)
    row = (n * HP + p // OW * SH) * WP + p % OW * SW
    part = tl.program_id(1)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    steps: tl.constexpr = C // BK
    # loads of weights: the bytes of an output channel, and those of BK input channels
    channel: tl.constexpr = KH * KW * C // 2 if NIBBLES else KH * KW * C
    depth: tl.constexpr = BK // 2 if NIBBLES else BK
    k = tl.arange(0, depth)
    if NIBBLES:
        zero = tl.load(nibble_zero + o)
    share: tl.constexpr = (KH * KW * steps + SPLITS - 1) // SPLITS
    even: tl.constexpr = SPLITS * share == KH * KW * steps
    other: tl.constexpr = None if even else 0
    for i in range(0, share):
        step = part * share + i
        tap = step // steps
        at = (row + tap // KW * DH * WP + tap % KW * DW) * C + step % steps * BK
        live = None if even else step < KH * KW * steps
        xs = tl.load(q + at[:, None] + k[None, :], mask=live, other=other)
        ws = tl.load(weight + (o * channel + step * depth)[None, :] + k[:, None], mask=live, other=other)
        if NIBBLES:
            acc = tl.dot(xs, (ws & 15).to(tl.int8) - zero[None, :], acc, out_dtype=tl.int32)
            xs = tl.load(q + at[:, None] + (depth + k)[None, :], mask=live, other=other)
            ws = (ws >> 4).to(tl.int8) - zero[None, :]
        acc = tl.dot(xs, ws, acc, out_dtype=tl.int32)
    if SPLITS > 1:
        where = (part * M + rm).to(tl.int64)[:, None] * OC + rn[None, :]
        tl.store(scratch + where, acc, mask=(rm < M)[:, None] & (rn < OC)[None, :])
    else:
        _finish(
            acc, rm, rn, n, row, sums, weight_sums, weight_zero, scale, bias, shift, residual, x_scale, x_zero, group,
            y, M, OC, WP, KH, KW, DH, DW, OFFSET, ROOM, TERM, CORRECT, BIAS, SHIFT, RESIDUAL,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    scratch, sums, weight_sums, weight_zero, scale, bias, shift, residual, x_scale, x_zero, group, y,
    N, HP, WP, OH, OW, OC,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    OFFSET: tl.constexpr, ROOM: tl.constexpr, TERM: tl.constexpr, CORRECT: tl.constexpr, BIAS: tl.constexpr,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a split product [SPLITS, M, OC] and do what `product_kernel` does after its sums."""
    M = N * OH * OW
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.minimum(rm, M - 1)
    n, p = m // (OH * OW), m % (OH * OW)
    row = (n * HP + p // OW * SH) * WP + p % OW * SW
    both = (rm < M)[:, None] & (rn < OC)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for part in range(0, SPLITS):
        where = (part * M + rm).to(tl.int64)[:, None] * OC + rn[None, :]
        acc += tl.load(scratch + where, mask=both, other=0)
    _finish(
        acc, rm, rn, n, row, sums, weight_sums, weight_zero, scale, bias, shift, residual, x_scale, x_zero, group, y,
        M, OC, WP, KH, KW, DH, DW, OFFSET, ROOM, TERM, CORRECT, BIAS, SHIFT, RESIDUAL,
    )  # fmt: skip


@triton.jit
def norm_kernel(
    x, weight, bias, a, b, stride_n, stride_h, stride_w, stride_c, W, C, eps,
    PIXELS: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The GroupNorm of one group of WIDTH channels of one image as a x + b; a, b: [N, C].

    Means and squared deviations of blocks of BP pixels are combined one after the other (Chan et al. 1979), so nothing
    cancels out.
    """
    n, first = tl.program_id(1), tl.program_id(0) * WIDTH
    c = tl.arange(0, BC)
    mean, squares, count = 0.0, 0.0, 0.0
    for start in range(0, PIXELS, BP):
        p = start + tl.arange(0, BP)
        mask = (p < PIXELS)[:, None] & (c < WIDTH)[None, :]
        at = n.to(tl.int64) * stride_n + p // W * stride_h + p % W * stride_w
        v = tl.load(x + at[:, None] + ((first + c) * stride_c)[None, :], mask=mask, other=0.0).to(tl.float32)
        more = tl.sum(tl.where(p < PIXELS, 1.0, 0.0), axis=0) * WIDTH
        part = tl.sum(tl.sum(v, axis=1), axis=0) / more
        centered = tl.where(mask, v - part, 0.0)
        distance = part - mean
        squares += tl.sum(tl.sum(centered * centered, axis=1), axis=0) + distance * distance * (
            count * more / (count + more)
        )
        count += more
        mean += distance * (more / count)
    rstd = 1.0 / tl.sqrt_rn(squares / (PIXELS * WIDTH) + eps)
    factor = tl.load(weight + first + c, mask=c < WIDTH, other=0.0) * rstd
    offset = tl.load(bias + first + c, mask=c < WIDTH, other=0.0) - mean * factor
    tl.store(a + n * C + first + c, factor, mask=c < WIDTH)
    tl.store(b + n * C + first + c, offset, mask=c < WIDTH)


@triton.jit
def _logits(tq, sum_q, k, b, start, qk_scale, zq, zk, L, D, DP: tl.constexpr, BL: tl.constexpr):
    """The logits of a tile of queries and the keys from `start` on, float32 [BM, BL]; -inf beyond the last key."""
    rl, rd = start + tl.arange(0, BL), tl.arange(0, DP)
    tk = tl.load(k + (b * L + rl)[None, :] * DP + rd[:, None], mask=(rl < L)[None, :], other=0)
    sum_k = tl.sum(tk.to(tl.int32), axis=0)
    s = tl.dot(tq, tk, out_dtype=tl.int32) - zk * sum_q[:, None] - (zq * sum_k)[None, :] + DP * zq * zk
    return tl.where((rl < L)[None, :], s.to(tl.float32) * qk_scale, float("-inf"))


@triton.jit
def attention_kernel(
    q, k, v, y, q_scale, q_zero, k_scale, k_zero, v_scale, v_zero, p_scale, p_zero, group, T, heads, factor,
    L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    Q_OFFSET: tl.constexpr, K_OFFSET: tl.constexpr, V_OFFSET: tl.constexpr, P_OFFSET: tl.constexpr,
    P_LOWEST: tl.constexpr, P_HIGHEST: tl.constexpr, WIDE: tl.constexpr, ROOM: tl.constexpr,
    BM: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """softmax(factor q k^T) v of one head, where probabilities are quantized too.

    q: [B, T, DP], k, v: [B, L, DP] bytes whose channels from D on hold the zero point; y: [N, T, heads, D]. The first
    pass finds the maximum and the sum of each row of the softmax, the second one the probabilities. Those of more than
    8 bits (WIDE) are two bytes, which are multiplied with v one after the other.
    """
    at = tl.load(group)
    zq = stored_zero(tl.load(q_zero + at), Q_OFFSET, False, 0)
    zk = stored_zero(tl.load(k_zero + at), K_OFFSET, False, 0)
    zv = stored_zero(tl.load(v_zero + at), V_OFFSET, False, 0)
    zero_p, dp = tl.load(p_zero + at), tl.load(p_scale + at)
    qk_scale = tl.load(q_scale + at) * tl.load(k_scale + at) * factor
    b = tl.program_id(1)
    rm, rd = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, DP)
    tq = tl.load(q + (b * T + rm)[:, None] * DP + rd[None, :], mask=(rm < T)[:, None], other=0)
    sum_q = tl.sum(tq.to(tl.int32), axis=1)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, L, BL):
        x = _logits(tq, sum_q, k, b, start, qk_scale, zq, zk, L, D, DP, BL)
        new = tl.maximum(top, tl.max(x, axis=1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), axis=1)
        top = new
    low = tl.zeros((BM, DP), tl.int32)
    high = tl.zeros((BM, DP), tl.int32)
    low_sum = tl.zeros((BM,), tl.int32)
    high_sum = tl.zeros((BM,), tl.int32)
    v_sum = tl.zeros((DP,), tl.int32)
    z_low = stored_zero(zero_p, P_OFFSET, ROOM, _LOW if WIDE else 0)
    z_high = stored_zero(zero_p, P_OFFSET, ROOM, _HIGH)
    for start in range(0, L, BL):
        x = _logits(tq, sum_q, k, b, start, qk_scale, zq, zk, L, D, DP, BL)
        p = tl.div_rn(tl.exp(x - top[:, None]), total[:, None] + tl.zeros((BM, BL), tl.float32))
        p = tl.div_rn(p, dp + tl.zeros((BM, BL), tl.float32))
        p = (tl.minimum(p, P_HIGHEST - zero_p + 1.0) + _ROUND) - _ROUND
        integer = tl.minimum(tl.maximum(p, P_LOWEST - zero_p), P_HIGHEST - zero_p).to(tl.int32)
        rl = start + tl.arange(0, BL)
        tv = tl.load(v + (b * L + rl)[:, None] * DP + rd[None, :], mask=(rl < L)[:, None], other=0)
        v_sum += tl.sum(tv.to(tl.int32), axis=0)
        if WIDE:
            integer += stored_zero(zero_p, P_OFFSET, ROOM, 0)
            upper = (integer >> 8) - 128
            high = tl.dot(upper.to(tl.int8), tv, high, out_dtype=tl.int32)
            high_sum += tl.sum(tl.where((rl < L)[None, :], upper, 0), axis=1)
            lower = (integer & 255) - 128
        else:
            lower = integer + z_low
        low = tl.dot(lower.to(tl.int8), tv, low, out_dtype=tl.int32)
        low_sum += tl.sum(tl.where((rl < L)[None, :], lower, 0), axis=1)
    low += L * z_low * zv - zv * low_sum[:, None] - (z_low * v_sum)[None, :]
    out = low.to(tl.float32)
    if WIDE:
        high += L * z_high * zv - zv * high_sum[:, None] - (z_high * v_sum)[None, :]
        out += high.to(tl.float32) * 256.0
    out = out * (dp * tl.load(v_scale + at))
    where = ((b // heads * T + rm).to(tl.int64) * heads + b % heads)[:, None] * D + rd[None, :]
    tl.store(y + where, out.to(y.dtype.element_ty), mask=(rm < T)[:, None] & (rd < D)[None, :])
