"""Uniform affine quantization and AdaRound as pure functions on tensors.

    q = clamp(round(x / scale) + zero_point, 0, 2^b - 1),   x^ = (q - zero_point) * scale

A symmetric grid has zero_point = 0 and q is clamped to [-L - 1, L] with L = 2^(b-1) - 1. The formulas are those of the
published method (Q-Diffusion, arXiv 2302.04304, and BRECQ, arXiv 2102.05426); `qdiff.scale_rules` chooses the scales.
"""

import logging
import math

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MIN_SCALE = 1e-8


def integer_range(n_bits: int, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest integer of a `n_bits` grid."""
    return (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if symmetric else (0, 2**n_bits - 1)


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest (half to even); the gradient passes straight through."""
    return x + (x.round() - x).detach()


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int, symmetric: bool) -> Tensor:
    """Quantize and dequantize `x`, differentiable in `x` and `scale` (LSQ, arXiv 1902.08153)."""
    low, high = integer_range(n_bits, symmetric)
    q = torch.clamp(round_ste(x / scale) + zero_point, low, high)
    return (q - zero_point) * scale


def quantize_nearest(x: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int, symmetric: bool = False) -> Tensor:
    """The integers of `x` by nearest rounding, as a float tensor of the shape of `x`."""
    low, high = integer_range(n_bits, symmetric)
    return torch.clamp((x / scale).round() + zero_point, low, high)


def qparams_from_range(
    low: Tensor,
    high: Tensor,
    n_bits: int,
    symmetric: bool,
    always_zero: bool = False,
    growth: float = 1.0,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """The scale and zero point of the range [low, high]; formed in float64 on the CPU, because MPS has none.

    Args:
        low, high: the ends of the range, of one shape.
        n_bits: the width of the integers, 2 to 16.
        symmetric: the integers are signed and the zero point is 0.
        always_zero: the zero point is 0 and the integers are unsigned.
        growth: a factor on symmetric ranges and on the low end that the zero point comes from.
        name: what a warning calls the quantizer.

    Returns:
        scale and zero_point, float32, of the shape of `low`; scales are at least MIN_SCALE.
    """
    device = low.device
    low, high = low.cpu().double(), high.cpu().double()
    if symmetric:
        limit = torch.maximum(high, -low).clamp(min=0.0) * growth
        scale = limit / (2 ** (n_bits - 1) - 1)
    else:
        scale = (high - low) / (2**n_bits - 1)
    if bool((scale < MIN_SCALE).any()):
        count = int((scale < MIN_SCALE).sum())
        log.warning(
            "%sdegenerate range: %d of %d scales set to %g",
            f"{name}: " if name else "",
            count,
            scale.numel(),
            MIN_SCALE,
        )
        scale = scale.clamp(min=MIN_SCALE)
    if symmetric or always_zero:
        return scale.float().to(device), torch.zeros_like(scale, dtype=torch.float32).to(device)
    return scale.float().to(device), torch.round(-(low.clamp(max=0.0) * growth) / scale).float().to(device)


def running_range(low: Tensor | None, high: Tensor | None, x: Tensor, momentum: float = 0.95) -> tuple[Tensor, Tensor]:
    """Running minimum and maximum: the first batch sets them, each further one moves them by 1 - momentum."""
    new_low, new_high = x.detach().amin().float(), x.detach().amax().float()
    if low is None or high is None:
        return new_low, new_high
    return momentum * low + (1 - momentum) * new_low, momentum * high + (1 - momentum) * new_high


# --- AdaRound (arXiv 2004.10568) -----------------------------------------------------------------

GAMMA, ZETA = -0.1, 1.1  # the stretch of the rectified sigmoid, eq. 23
ALPHA_SATURATED = math.log((1 - GAMMA) / (ZETA - 1))  # h(alpha) = 1, and h(-alpha) = 0


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha) = clamp(sigmoid(alpha) * 1.2 - 0.1, 0, 1), eq. 23."""
    return torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def init_alpha(weight: Tensor, scale: Tensor) -> Tensor:
    """The alpha for which h(alpha) is the fractional part of weight / delta."""
    fraction = weight / scale - torch.floor(weight / scale)
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def soft_round(weight: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int) -> Tensor:
    """Dequantized weight under soft rounding, differentiable in `alpha`, eq. 22."""
    q = torch.clamp(torch.floor(weight / scale) + rectified_sigmoid(alpha) + zero_point, 0, 2**n_bits - 1)
    return (q - zero_point) * scale


def hard_integers(weight: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int) -> Tensor:
    """The final integers: up where alpha >= 0, down elsewhere; a float tensor of the shape of `weight`."""
    return torch.clamp(torch.floor(weight / scale) + (alpha >= 0) + zero_point, 0, 2**n_bits - 1)


def alpha_from_integers(weight: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """A saturated alpha with which `hard_integers` (and `soft_round`) give back `integers`."""
    up = integers - zero_point > torch.floor(weight / scale)
    return torch.where(up, ALPHA_SATURATED, -ALPHA_SATURATED).to(torch.float32)


def rounding_regularizer(alpha: Tensor, beta: float) -> Tensor:
    """sum(1 - |2 h(alpha) - 1|^beta), eq. 24: pulls h to 0 or 1 as beta falls."""
    return (1 - (2 * rectified_sigmoid(alpha) - 1).abs().pow(beta)).sum()


def beta_schedule(step: int, total: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """beta at `step` of `total`: `start` during the warm-up, then linear to `end`."""
    begin = warmup * total
    if step < begin:
        return start
    return end + (start - end) * max(0.0, 1 - (step - begin) / (total - begin))
