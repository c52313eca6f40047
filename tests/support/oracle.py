"""An independent reference for quantization, attention, and sampling, in plain NumPy and float64.

Everything here was written from the papers' formulas, not from the code of this project, and it is slow on
purpose: a reader should be able to hold each function beside the equation that its docstring names. PyTorch
is not imported. Arrays are float64; integers that are quantized values are float64 too, because zero points
may be negative and large.

Papers, by the names that the docstrings use:
    Q-Diffusion: Li et al. 2023, arXiv 2302.04304.
    BRECQ: Li et al. 2021, arXiv 2102.05426.
    White paper: Nagel et al. 2021, arXiv 2106.08295.
    AdaRound: Nagel et al. 2020, arXiv 2004.10568.
    LSQ: Esser et al. 2020, arXiv 1902.08153.
    LAPQ: Nahshan et al. 2019, arXiv 1911.07190.
    DDPM: Ho et al. 2020, arXiv 2006.11239.
    DDIM: Song et al. 2021, arXiv 2010.02502.
    PLMS: Liu et al. 2022, arXiv 2202.09778.
    DPM-Solver: Lu et al. 2022, arXiv 2206.00927.
    DPM-Solver++: Lu et al. 2022, arXiv 2211.01095.
    Guidance: Ho and Salimans 2022, arXiv 2207.12598.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Scale = Array | float  # one number, or an array that broadcasts: one value for each channel
Denoiser = Callable[[Array, float], Array]  # eps(x_t, t), of the shape of x_t

MIN_DELTA = 1e-8  # the least scale that a degenerate range gets
SHRINK_FACTORS = [(100 - i) / 100 for i in range(80)]  # 1.00, 0.99, ..., 0.21
MSE_POWER = 2.4  # the error of the rule `mse` is the mean of |x - x^|^2.4


# --- the uniform affine quantizer ------------------------------------------------------------------


def grid_limits(n_bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest integer: [-2^(b-1), 2^(b-1) - 1] if symmetric, else [0, 2^b - 1]."""
    if symmetric:
        return -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1
    return 0, 2**n_bits - 1


def quantize(x: Array, delta: Scale, zero_point: Scale, n_bits: int, symmetric: bool) -> Array:
    """q = clamp(round(x / delta) + zero_point, low, high); White paper eq. 4.

    Args:
        x: any shape.
        delta, zero_point: numbers, or arrays that broadcast against `x` (one value for each channel).

    Returns:
        The integers, of the shape of `x`. Halves are rounded to the even neighbor.
    """
    low, high = grid_limits(n_bits, symmetric)
    return np.minimum(np.maximum(np.rint(x / delta) + zero_point, low), high)


def dequantize(q: Array, delta: Scale, zero_point: Scale) -> Array:
    """x^ = (q - zero_point) * delta; White paper eq. 6."""
    return (q - zero_point) * delta


@dataclass(frozen=True)
class Quantizer:
    """The settings of one quantizer; calling it replaces `x` by the nearest value on its grid.

    Args:
        delta, zero_point: numbers, or arrays that broadcast against the input.
        n_bits: the width of the integers.
        symmetric: whether the integers are signed.
    """

    delta: Scale
    zero_point: Scale
    n_bits: int
    symmetric: bool = False

    def integers(self, x: Array) -> Array:
        return quantize(x, self.delta, self.zero_point, self.n_bits, self.symmetric)

    def __call__(self, x: Array) -> Array:
        return dequantize(self.integers(x), self.delta, self.zero_point)


def no_quantizer(x: Array) -> Array:
    """A quantizer that is switched off."""
    return x


def lsq_gradients(
    x: Array,
    delta: float,
    zero_point: float,
    n_bits: int,
    symmetric: bool,
) -> tuple[Array, Array]:
    """The derivatives of x^ by x and by delta, with rounding taken as the identity; LSQ eq. 3 and 5.

    Returns:
        (d x^ / d x, d x^ / d delta), each of the shape of `x`. Inside the range the first is 1 and the second
        is round(x / delta) - x / delta. Outside, the first is 0 and the second is the bound itself.
    """
    low, high = grid_limits(n_bits, symmetric)
    by_x, by_delta = np.zeros(x.shape), np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        ratio = x[index] / delta
        q = np.rint(ratio) + zero_point
        if q < low:
            by_delta[index] = low - zero_point
        elif q > high:
            by_delta[index] = high - zero_point
        else:
            by_x[index], by_delta[index] = 1.0, np.rint(ratio) - ratio
    return by_x, by_delta


# --- scale rules -----------------------------------------------------------------------------------


def scale_of_range(
    low: float, high: float, n_bits: int, rule: str, symmetric: bool = False, always_zero: bool = False
) -> tuple[float, float]:
    """(delta, zero_point) of the range [low, high] by the rules `max` and `max_scale` of the published code.

    The rule `max_scale` multiplies the ends of the range by (b + 2) / 8. If the quantizer is symmetric, this
    changes the scale. Otherwise it changes the zero point alone, which may then lie outside the grid.
    """
    growth = (n_bits + 2) / 8 if rule == "max_scale" else 1.0
    if symmetric:
        delta = max(abs(low), abs(high)) * growth / (2 ** (n_bits - 1) - 1)
        return max(delta, MIN_DELTA), 0.0
    delta = max((high - low) / (2**n_bits - 1), MIN_DELTA)
    if always_zero:
        return delta, 0.0
    return delta, float(np.rint(-min(low, 0.0) * growth / delta))


def mse_candidates(
    x: Array,
    n_bits: int,
    symmetric: bool = False,
    always_zero: bool = False,
) -> list[tuple[float, float, float]]:
    """(error, delta, zero_point) of each of the 80 shrunk ranges of the rule `mse`; LAPQ has the L_p norm.

    The range is [f min, f max] for f = 1.00, 0.99, ..., 0.21, and the error is the mean of |x - x^|^2.4 over
    all of `x`.
    """
    found = []
    for factor in SHRINK_FACTORS:
        low, high = factor * float(x.min()), factor * float(x.max())
        if symmetric:
            delta = max(abs(low), abs(high)) / (2 ** (n_bits - 1) - 1)
        elif always_zero:
            delta = high / (2**n_bits - 1)
        else:
            delta = (high - low) / (2**n_bits - 1)
        delta = max(delta, MIN_DELTA)
        zero_point = 0.0 if symmetric or always_zero else float(np.rint(-low / delta))
        rounded = dequantize(quantize(x, delta, zero_point, n_bits, symmetric), delta, zero_point)
        found.append((float(np.mean(np.abs(x - rounded) ** MSE_POWER)), delta, zero_point))
    return found


def scale(
    x: Array,
    n_bits: int,
    rule: str,
    symmetric: bool = False,
    always_zero: bool = False,
) -> tuple[float, float]:
    """(delta, zero_point) of a tensor by `max`, `max_scale`, or `mse` (the first of equal errors)."""
    if rule != "mse":
        return scale_of_range(float(x.min()), float(x.max()), n_bits, rule, symmetric, always_zero)
    best = min(mse_candidates(x, n_bits, symmetric, always_zero), key=lambda candidate: candidate[0])
    return best[1], best[2]


def channel_scales(
    x: Array,
    n_bits: int,
    rule: str,
    symmetric: bool = False,
    always_zero: bool = False,
) -> tuple[Array, Array]:
    """(delta, zero_point) of each x[c]; each array is [C, 1, ..., 1] with as many dimensions as `x`."""
    pairs = np.array([scale(channel, n_bits, rule, symmetric, always_zero) for channel in x])  # [C, 2]
    shape = (len(x),) + (1,) * (x.ndim - 1)
    return pairs[:, 0].reshape(shape), pairs[:, 1].reshape(shape)


def running_ranges(batches: Sequence[Array], momentum: float = 0.95) -> list[tuple[float, float]]:
    """(min, max) after each batch: the first batch sets them, each later one moves them by 5 % of the way."""
    ranges: list[tuple[float, float]] = []
    for batch in batches:
        low, high = float(batch.min()), float(batch.max())
        if ranges:
            low = momentum * ranges[-1][0] + (1 - momentum) * low
            high = momentum * ranges[-1][1] + (1 - momentum) * high
        ranges.append((low, high))
    return ranges


# --- AdaRound --------------------------------------------------------------------------------------


def rectified_sigmoid(alpha: Array) -> Array:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1; AdaRound eq. 23."""
    sigmoid = 1 / (1 + np.exp(-alpha))
    return np.clip(1.2 * sigmoid - 0.1, 0, 1)


def initial_alpha(weight: Array, delta: Array) -> Array:
    """The alpha for which h(alpha) is the fractional part of weight / delta.

    It is the logit of (fraction + 0.1) / 1.2; BRECQ and AdaRound begin there.
    """
    ratio = weight / delta
    p = (ratio - np.floor(ratio) + 0.1) / 1.2
    return np.log(p / (1 - p))


def soft_rounded(weight: Array, alpha: Array, delta: Array, zero_point: Array, n_bits: int) -> Array:
    """The weight delta * (clip(floor(w / delta) + h(alpha) + z, 0, 2^b - 1) - z); AdaRound eq. 22."""
    q = np.clip(np.floor(weight / delta) + rectified_sigmoid(alpha) + zero_point, 0, 2**n_bits - 1)
    return dequantize(q, delta, zero_point)


def hard_rounded(weight: Array, alpha: Array, delta: Array, zero_point: Array, n_bits: int) -> Array:
    """The final integers: the weight is rounded up where alpha is not negative and down elsewhere."""
    up = np.where(alpha >= 0, 1.0, 0.0)
    return np.clip(np.floor(weight / delta) + up + zero_point, 0, 2**n_bits - 1)


def rounding_regularizer(alpha: Array, beta: float) -> float:
    """sum of 1 - |2 h(alpha) - 1|^beta; AdaRound eq. 24."""
    return float(sum(1 - abs(2 * h - 1) ** beta for h in rectified_sigmoid(alpha).ravel()))


def beta_at(step: int, total: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """The regularizer's exponent: `start` in the warm-up, then a straight line to `end` at step `total`."""
    first = warmup * total
    if step <= first:
        return start
    return float(np.interp(step, [first, total], [start, end]))


# --- layers ----------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """y[..., o] = sum over i of x[..., i] weight[o, i], plus bias[o]; x is [..., I], weight [O, I]."""
    y = np.zeros((*x.shape[:-1], len(weight)))
    for o, row in enumerate(weight):
        y[..., o] = (x * row).sum(-1) + (0 if bias is None else bias[o])
    return y


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Array:
    """A convolution (cross-correlation) of any number of spatial dimensions with zeros around the input.

    Args:
        x: [N, I, ...].
        weight: [O, I / groups, ...].
        bias: [O], or None.
        stride, padding, dilation: one number for each spatial dimension.
        groups: output channels of group g see only the input channels of group g.

    Returns:
        [N, O, ...], where a spatial size s becomes (s + 2 padding - dilation (kernel - 1) - 1) // stride + 1.
    """
    sizes, kernel = x.shape[2:], weight.shape[2:]
    x = np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding])
    # the number of pixels from the first to the last tap
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [(s + 2 * p - r) // t + 1 for s, p, r, t in zip(sizes, padding, reach, stride, strict=True)]
    inputs, outputs = weight.shape[1], len(weight) // groups
    y = np.zeros((len(x), len(weight), *out))
    for position in np.ndindex(*out):
        corners = [i * t for i, t in zip(position, stride, strict=True)]
        taps = [slice(c, c + r, d) for c, r, d in zip(corners, reach, dilation, strict=True)]
        for o in range(len(weight)):
            group = o // outputs
            seen = x[(slice(None), slice(group * inputs, (group + 1) * inputs), *taps)]
            y[(slice(None), o, *position)] = (seen * weight[o]).reshape(len(x), -1).sum(1)
    return y if bias is None else y + bias.reshape(1, -1, *[1] * len(out))


Layer = Callable[[Array, Array, Array | None], Array]  # (input, weight, bias) -> output


def quantized_layer(
    layer: Layer,
    x: Array,
    weight: Array,
    bias: Array | None,
    weight_quantizer: Quantizer,
    input_quantizer: Callable,
) -> Array:
    """A layer with quantized weight and input and an exact bias; White paper section 2.1."""
    return layer(input_quantizer(x), weight_quantizer(weight), bias)


def split_layer(
    layer: Layer,
    h: Array,
    skip: Array,
    weight_h: Array,
    weight_skip: Array,
    bias: Array | None,
    weight_quantizers: tuple[Quantizer, Quantizer],
    input_quantizers: tuple[Callable, Callable],
) -> Array:
    """A layer on the concatenation [h, skip], each half quantized alone (Q-Diffusion: shortcut splitting).

    A layer is linear, so that the output is the sum of what the halves give. The bias is added once.

    Args:
        h, skip: [N, C_h, ...] and [N, C_skip, ...].
        weight_h, weight_skip: the parts of the weight for the input channels of each half.
        weight_quantizers, input_quantizers: those of h, then those of skip.
    """
    first = quantized_layer(layer, h, weight_h, bias, weight_quantizers[0], input_quantizers[0])
    return first + quantized_layer(layer, skip, weight_skip, None, weight_quantizers[1], input_quantizers[1])


def group_norm(x: Array, groups: int, weight: Array, bias: Array, eps: float) -> Array:
    """Group normalization (Wu and He 2018, arXiv 1803.08494, section 3) of [N, C, ...], gain and bias [C]."""
    y = np.zeros(x.shape)
    size = x.shape[1] // groups
    for n, g in itertools.product(range(len(x)), range(groups)):
        part = x[n, g * size : (g + 1) * size]
        y[n, g * size : (g + 1) * size] = (part - part.mean()) / math.sqrt(part.var() + eps)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return y * weight.reshape(shape) + bias.reshape(shape)


# --- attention -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionQuantizers:
    """The quantizers of the operands of an attention's two products: q, k, v, and the probabilities w."""

    q: Callable[[Array], Array] = no_quantizer
    k: Callable[[Array], Array] = no_quantizer
    v: Callable[[Array], Array] = no_quantizer
    w: Callable[[Array], Array] = no_quantizer


def softmax(logits: Array) -> Array:
    """exp(l_i) / sum of exp(l_j) of a vector."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _attend(q: Array, k: Array, v: Array, scaling: float, quantize_w: Callable[[Array], Array]) -> Array:
    """For each query i: sum over j of w_ij v_j with w_i = softmax over j of (scaling q_i . k_j).

    Args:
        q: [T, d]. k, v: [L, d].

    Returns:
        [T, d].
    """
    out = np.zeros((len(q), v.shape[1]))
    for i, query in enumerate(q):
        probabilities = quantize_w(softmax(np.array([scaling * (query * key).sum() for key in k])))
        for probability, value in zip(probabilities, v, strict=True):
            out[i] += probability * value
    return out


def pixel_attention(q: Array, k: Array, v: Array, quantizers: AttentionQuantizers) -> Array:
    """Single-head attention over the pixels of the DDPM network (DDPM appendix B).

    q and k are quantized as they come from their convolutions. The logits are scaled by C^-1/2 afterwards.

    Args:
        q, k, v: [N, C, H, W].

    Returns:
        [N, C, H, W], before the output projection.
    """
    n, c, height, width = q.shape
    q, k, v = quantizers.q(q), quantizers.k(k), quantizers.v(v)
    out = np.zeros(q.shape)
    for i in range(n):
        queries, keys, values = (part[i].reshape(c, -1).T for part in (q, k, v))  # [HW, C]
        attended = _attend(queries, keys, values, c**-0.5, quantizers.w)
        out[i] = attended.T.reshape(c, height, width)
    return out


def qkv_attention(qkv: Array, heads: int, quantizers: AttentionQuantizers) -> Array:
    """Multi-head attention with the "legacy" order of channels: [head 0: q, k, v; head 1: q, k, v; ...].

    q and k are each scaled by d^-1/4 first and quantized afterwards; the logits are not scaled again.

    Args:
        qkv: [N, heads * 3 * d, T].

    Returns:
        [N, heads * d, T], before the output projection.
    """
    n, channels, length = qkv.shape
    d = channels // (3 * heads)
    out = np.zeros((n, heads * d, length))
    for i, head in itertools.product(range(n), range(heads)):
        start = head * 3 * d
        q, k, v = (qkv[i, start + part * d : start + (part + 1) * d].T for part in range(3))  # [T, d]
        q, k, v = quantizers.q(q * d**-0.25), quantizers.k(k * d**-0.25), quantizers.v(v)
        out[i, head * d : (head + 1) * d] = _attend(q, k, v, 1.0, quantizers.w).T
    return out


def cross_attention(q: Array, k: Array, v: Array, heads: int, quantizers: AttentionQuantizers) -> Array:
    """Multi-head attention of tokens to a context (latent diffusion, arXiv 2112.10752, section 3.3).

    q and k are quantized as they come from their projections. The logits are scaled by d^-1/2 afterwards.

    Args:
        q: [N, T, heads * d]. k, v: [N, L, heads * d].

    Returns:
        [N, T, heads * d], before the output projection.
    """
    d = q.shape[2] // heads
    q, k, v = quantizers.q(q), quantizers.k(k), quantizers.v(v)
    out = np.zeros(q.shape)
    for i, head in itertools.product(range(len(q)), range(heads)):
        part = slice(head * d, (head + 1) * d)
        out[i][:, part] = _attend(q[i][:, part], k[i][:, part], v[i][:, part], d**-0.5, quantizers.w)
    return out


# --- the forward process and its time steps -----------------------------------------------------------


def linear_betas(start: float, end: float, total: int = 1000) -> Array:
    """Betas [total] on a straight line; DDPM section 4."""
    return np.array([start + (end - start) * i / (total - 1) for i in range(total)])


def latent_betas(start: float, end: float, total: int = 1000) -> Array:
    """Betas [total] of latent diffusion, whose square roots are on a straight line (arXiv 2112.10752)."""
    return linear_betas(math.sqrt(start), math.sqrt(end), total) ** 2


def alpha_bars(betas: Array) -> Array:
    """alpha-bar_t = product over s <= t of (1 - beta_s), [T]; DDPM eq. 4."""
    found, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        found.append(product)
    return np.array(found)


def pixel_steps(skip_type: str, steps: int, total: int = 1000) -> list[int]:
    """Ascending time steps of the pixel family; DDIM appendix D.2.

    The quadratic steps are the integer parts of the squares of even points of [0, sqrt(0.8 * total)]. They
    repeat for small t.
    """
    if skip_type == "uniform":
        return list(range(0, total, total // steps))
    return [math.floor(point**2) for point in np.linspace(0, np.sqrt(0.8 * total), steps)]


def latent_steps(steps: int, total: int = 1000) -> list[int]:
    """Ascending time steps of the latent family: 1, then every (total // steps)-th; total - 1 is the last."""
    found: list[int] = []
    for t in range(0, total, total // steps):
        t = min(t + 1, total - 1)
        if t not in found:
            found.append(t)
    return found


def guided(e_uncond: Array, e_cond: Array, scale: float) -> Array:
    """Classifier-free guidance e_u + s (e_c - e_u); Guidance eq. 6 with w = s - 1."""
    return (1 - scale) * e_uncond + scale * e_cond


# --- samplers --------------------------------------------------------------------------------------
# All samplers have one signature, sample(eps, x, a_bar, steps, noises), and return x_0:
#     eps: the denoiser. x: the starting noise [N, ...]. a_bar: alpha-bar_t [T].
#     steps: the ascending time steps, or for DPM-Solver++ the number of evaluations.
#     noises: standard normal arrays of the shape of x, taken in order; deterministic samplers take none.

Noises = Iterator[Array]


def _ddim_step(x: Array, e: Array, a: float, a_prev: float, sigma: float, noise: Array | float) -> Array:
    """One step of DDIM eq. 12: predicted x_0, direction pointing to x_t, and random noise."""
    predicted_x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
    direction = math.sqrt(1 - a_prev - sigma**2) * e
    return math.sqrt(a_prev) * predicted_x0 + direction + sigma * noise


def _ddim(
    eps: Denoiser,
    x: Array,
    a_bar: Array,
    steps: Sequence[int],
    noises: Noises,
    eta: float,
    last: float,
) -> Array:
    """DDIM eq. 12 with sigma from eq. 16; `last` is the alpha-bar that the final step goes to."""
    for i in range(len(steps) - 1, -1, -1):
        a = a_bar[steps[i]]
        a_prev = a_bar[steps[i - 1]] if i > 0 else last
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        noise = next(noises) if eta > 0 else 0.0
        x = _ddim_step(x, eps(x, steps[i]), a, a_prev, sigma, noise)
    return x


def pixel_ddim(
    eps: Denoiser,
    x: Array,
    a_bar: Array,
    steps: Sequence[int],
    noises: Noises,
    eta: float = 0.0,
) -> Array:
    """DDIM of the pixel family: the final step goes to alpha-bar = 1."""
    return _ddim(eps, x, a_bar, steps, noises, eta, last=1.0)


def latent_ddim(
    eps: Denoiser,
    x: Array,
    a_bar: Array,
    steps: Sequence[int],
    noises: Noises,
    eta: float = 0.0,
) -> Array:
    """DDIM of the latent family: the final step goes to alpha-bar_0, so that some noise remains."""
    return _ddim(eps, x, a_bar, steps, noises, eta, last=float(a_bar[0]))


def _posterior_mean(x: Array, x0: Array, a: float, a_prev: float) -> Array:
    """The mean of q(x_prev | x_t, x_0); DDPM eq. 7."""
    beta = 1 - a / a_prev  # of the whole jump between the two times
    return math.sqrt(a_prev) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * (1 - a_prev) / (1 - a) * x


def _clipped_x0(x: Array, e: Array, a: float) -> Array:
    """x_0 from x_t and eps (DDPM eq. 4 solved for x_0), clipped to [-1, 1]."""
    return np.clip((x - math.sqrt(1 - a) * e) / math.sqrt(a), -1, 1)


def ddpm_noisy(eps: Denoiser, x: Array, a_bar: Array, steps: Sequence[int], noises: Noises) -> Array:
    """Ancestral sampling of the pixel family with the larger variance; DDPM algorithm 2 with sigma^2 = beta.

    No noise is added at t = 0.
    """
    for i in range(len(steps) - 1, -1, -1):
        t = steps[i]
        a, a_prev = a_bar[t], (a_bar[steps[i - 1]] if i > 0 else 1.0)
        mean = _posterior_mean(x, _clipped_x0(x, eps(x, t), a), a, a_prev)
        x = mean + math.sqrt(1 - a / a_prev) * next(noises) if t > 0 else mean
    return x


def ancestral(eps: Denoiser, x: Array, a_bar: Array, steps: Sequence[int], noises: Noises) -> Array:
    """Ancestral sampling of the latent family with the posterior variance; DDPM eq. 7.

    `steps` are all time steps, one after the other. No noise is added at t = 0.
    """
    for t in reversed(steps):
        a, a_prev = a_bar[t], (a_bar[t - 1] if t > 0 else 1.0)
        x_mean = _posterior_mean(x, _clipped_x0(x, eps(x, t), a), a, a_prev)
        variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        x = x_mean + math.sqrt(variance) * next(noises) if t > 0 else x_mean
    return x


ADAMS_BASHFORTH = {  # weights of the newest noise prediction first; PLMS eq. 12 and its lower orders
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(eps: Denoiser, x: Array, a_bar: Array, steps: Sequence[int], noises: Noises) -> Array:
    """Pseudo linear multistep; PLMS algorithm 2, started by one improved Euler step.

    The first step averages the predictions at its two ends. Later steps combine up to four raw predictions by
    Adams-Bashforth.
    """
    newest_first: list[Array] = []
    for i in range(len(steps) - 1, -1, -1):
        a, a_prev = a_bar[steps[i]], a_bar[steps[i - 1]] if i > 0 else a_bar[0]
        e = eps(x, steps[i])
        newest_first = [e, *newest_first][:4]
        if len(newest_first) == 1:
            predicted = _ddim_step(x, e, a, a_prev, 0.0, 0.0)
            combined = 0.5 * e + 0.5 * eps(predicted, steps[i - 1] if i > 0 else steps[i])
        else:
            weights = ADAMS_BASHFORTH[len(newest_first)]
            combined = np.zeros(x.shape)
            for weight, past in zip(weights, newest_first, strict=True):
                combined += weight * past
        x = _ddim_step(x, combined, a, a_prev, 0.0, 0.0)
    return x


class ContinuousSchedule:
    """alpha, sigma, and lambda of the variance-preserving process at t in [1/T, 1]; DPM-Solver appendix D.

    log alpha is interpolated on straight lines between its values at t_n = n / T, n = 1 to T.
    """

    def __init__(self, a_bar: Array) -> None:
        self.total = len(a_bar)
        self.log_alphas = [0.5 * math.log(a) for a in a_bar]

    def alpha(self, t: float) -> float:
        times = [n / self.total for n in range(1, self.total + 1)]
        return math.exp(np.interp(t, times, self.log_alphas))

    def sigma(self, t: float) -> float:
        return math.sqrt(1 - self.alpha(t) ** 2)

    def half_log_snr(self, t: float) -> float:
        """lambda_t = log(alpha_t / sigma_t)."""
        return math.log(self.alpha(t) / self.sigma(t))

    def network_time(self, t: float) -> float:
        """The discrete time that the network gets, from 0 to 999, not rounded."""
        return (t - 1 / self.total) * 1000

    def predicted_x0(self, eps: Denoiser, x: Array, t: float) -> Array:
        """x_theta = (x - sigma_t eps) / alpha_t; DPM-Solver++ section 4."""
        return (x - self.sigma(t) * eps(x, self.network_time(t))) / self.alpha(t)

    def integrate(self, x: Array, s: float, t: float, x0: Array, slope: Array | float = 0.0) -> Array:
        """The exact solution from s to t if the data prediction were x0 + slope * (lambda - lambda_s).

        DPM-Solver++ proposition 4.1: x_t = sigma_t / sigma_s x_s + sigma_t * integral of exp(lambda)
        x_theta(lambda).
        With h = lambda_t - lambda_s the integral of exp(lambda) is exp(lambda_t) (1 - exp(-h)), that of
        exp(lambda) (lambda - lambda_s) is exp(lambda_t) (h - 1 + exp(-h)), and sigma_t exp(lambda_t) is
        alpha_t.
        """
        h = self.half_log_snr(t) - self.half_log_snr(s)
        constant, rising = 1 - math.exp(-h), h - 1 + math.exp(-h)
        return self.sigma(t) / self.sigma(s) * x + self.alpha(t) * (constant * x0 + rising * slope)


def single_step_orders(steps: int) -> list[int]:
    """Orders of the steps that take `steps` evaluations in all: DPM-Solver appendix D, "DPM-Solver-fast"."""
    full, rest = divmod(steps, 3)
    if rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [3] * full + [rest]


def dpm_solver_single(eps: Denoiser, x: Array, a_bar: Array, steps: int, noises: Noises) -> Array:
    """DPM-Solver++ of order 3, single step, with times uniform in t; DPM-Solver++ section 4 and appendix.

    A step of order 1 holds the data prediction constant. A step of order 3 makes it linear through the start
    and the second inner time, where that prediction comes from the same done with the first inner time. A
    step of order 2 uses its inner time by the midpoint formula of DPM-Solver++ algorithm 1.
    """
    schedule = ContinuousSchedule(a_bar)
    lam = schedule.half_log_snr
    grid = np.linspace(1, 1 / schedule.total, steps + 1)
    done = 0
    for order in single_step_orders(steps):
        s, t = float(grid[done]), float(grid[done + order])
        inner = [s + (t - s) * i / order for i in range(order)]
        x0 = schedule.predicted_x0(eps, x, s)
        if order == 1:
            x = schedule.integrate(x, s, t, x0)
        else:
            x_first = schedule.integrate(x, s, inner[1], x0)
            at_first = schedule.predicted_x0(eps, x_first, inner[1])
            slope = (at_first - x0) / (lam(inner[1]) - lam(s))
            if order == 2:
                r = (lam(inner[1]) - lam(s)) / (lam(t) - lam(s))
                x = schedule.integrate(x, s, t, (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * at_first)
            else:
                x_second = schedule.integrate(x, s, inner[2], x0, slope)
                at_second = schedule.predicted_x0(eps, x_second, inner[2])
                x = schedule.integrate(x, s, t, x0, (at_second - x0) / (lam(inner[2]) - lam(s)))
        done += order
    return x


def dpm_solver_2m(eps: Denoiser, x: Array, a_bar: Array, steps: int, noises: Noises) -> Array:
    """DPM-Solver++ 2M with times uniform in t; DPM-Solver++ algorithm 2.

    The first step is of order 1, and below 15 steps the last one is too.
    """
    schedule = ContinuousSchedule(a_bar)
    grid = [float(t) for t in np.linspace(1, 1 / schedule.total, steps + 1)]
    lambdas = [schedule.half_log_snr(t) for t in grid]
    predictions: list[Array] = []
    for i in range(steps):
        predictions.append(schedule.predicted_x0(eps, x, grid[i]))
        used = predictions[i]
        if i > 0 and (i < steps - 1 or steps >= 15):
            r = (lambdas[i] - lambdas[i - 1]) / (lambdas[i + 1] - lambdas[i])
            used = (1 + 1 / (2 * r)) * predictions[i] - 1 / (2 * r) * predictions[i - 1]
        x = schedule.integrate(x, grid[i], grid[i + 1], used)
    return x
