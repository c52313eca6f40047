"""Scale rules: how the values of a tensor become the scale and zero point of its integer grid.

A rule sees the values themselves. For activations these are a random sample of all that was seen, with the least and
the greatest value among them. A new rule is one function and one line that registers it:

    @SCALE_RULES.register("percentile")
    def percentile(values, n_bits, symmetric, always_zero, name=""):
        ...
        return scale, zero_point

It can then be named as `weight_scale_method` and `act_scale_method` (`qdiff.config.QuantConfig`).
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from qdiff.quantizers import MIN_SCALE, integer_range, qparams_from_range, quantize_nearest
from qdiff.utils.registry import Registry

MSE_CANDIDATES = 80  # ranges shrunk by 1.00, 0.99, ... 0.21
MSE_NORM = 2.4
RANGE_CANDIDATES, SMALLEST_SHRINK = 50, 0.8  # of `search_range`: shrunk by 1.00, 0.984, ... 0.216


class ScaleRule(Protocol):
    """A rule for the scale of a uniform grid."""

    def __call__(
        self, values: Tensor, n_bits: int, symmetric: bool, always_zero: bool, name: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Choose scales and zero points.

        Args:
            values: float32 [R, K]: R grids (output channels of a weight; 1 for activations), each with K values.
            n_bits: the width of the integers, 2 to 16.
            symmetric: the integers are signed and the zero point is 0.
            always_zero: the zero point is 0 and the integers are unsigned (attention probabilities).
            name: what a warning calls the quantizer.

        Returns:
            scale and zero_point, float32 [R, 1] each.
        """


SCALE_RULES: Registry[ScaleRule] = Registry("scale_method")


@SCALE_RULES.register("max")
def full_range(
    values: Tensor, n_bits: int, symmetric: bool, always_zero: bool, name: str = ""
) -> tuple[Tensor, Tensor]:
    """The full range of the values."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return qparams_from_range(low, high, n_bits, symmetric, always_zero, name=name)


@SCALE_RULES.register("max_scale")
def grown_range(
    values: Tensor, n_bits: int, symmetric: bool, always_zero: bool, name: str = ""
) -> tuple[Tensor, Tensor]:
    """The full range, grown by (b + 2) / 8 for symmetric scales and for the zero point."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return qparams_from_range(low, high, n_bits, symmetric, always_zero, growth=(n_bits + 2) / 8, name=name)


@SCALE_RULES.register("mse")
def least_error(
    values: Tensor, n_bits: int, symmetric: bool, always_zero: bool, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Of 80 shrunk ranges the one with the least mean |x - x^|^2.4. Every candidate is one operation over all rows."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    limit = torch.maximum(high, -low)
    best = torch.full_like(low, math.inf)
    best_scale, best_zero = torch.full_like(low, MIN_SCALE), torch.zeros_like(low)
    for candidate in range(MSE_CANDIDATES):
        shrink = 1.0 - candidate * 0.01
        if symmetric:
            scale, zero = limit * shrink / (2 ** (n_bits - 1) - 1), torch.zeros_like(low)
        elif always_zero:
            scale, zero = high * shrink / (2**n_bits - 1), torch.zeros_like(low)
        else:
            scale = (high * shrink - low * shrink) / (2**n_bits - 1)
            zero = torch.round(-(low * shrink) / scale.clamp(min=MIN_SCALE))
        scale = scale.clamp(min=MIN_SCALE)
        q = quantize_nearest(values, scale, zero, n_bits, symmetric)
        error = (values - (q - zero) * scale).abs().pow(MSE_NORM).mean(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


@SCALE_RULES.register("least_squares")
def least_squares(
    values: Tensor, n_bits: int, symmetric: bool, always_zero: bool, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Of ranges that include 0, shrunk in steps, the one with the least squared error.

    It is free of units: values that are multiplied by a power of two give the same zero points and the scales times
    that power, because errors are compared relative to the range.
    """
    return search_range(values, n_bits, symmetric, always_zero)


def search_range(
    values: Tensor, n_bits: int, symmetric: bool, always_zero: bool, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scales and zero points of least squared error, of RANGE_CANDIDATES shrunk ranges for each row.

    Args:
        values: float32 [R, K], see `ScaleRule`.
        n_bits: the width of the integers.
        symmetric: the integers are signed and the zero point is 0.
        always_zero: the zero point is 0 and the integers are unsigned.
        weights: importance of the squared errors, [K]; None: all count the same.

    Returns:
        scale and zero_point, float32 [R, 1]. A row of zeros has the scale 1.
    """
    low = torch.zeros_like(values[:, :1]) if always_zero else values.amin(1, keepdim=True).clamp(max=0)
    high = values.amax(1, keepdim=True).clamp(min=0)
    steps = 2 ** (n_bits - 1) - 1 if symmetric else 2**n_bits - 1
    span = torch.maximum(high, -low) if symmetric else high - low
    span = torch.where(span > 0, span, torch.full_like(span, steps))
    best = torch.full_like(span, math.inf)
    best_scale, best_zero = span / steps, torch.zeros_like(span)
    bounds, work = integer_range(n_bits, symmetric), torch.empty_like(values)
    for candidate in range(RANGE_CANDIDATES):
        shrink = 1.0 - SMALLEST_SHRINK * candidate / RANGE_CANDIDATES
        scale = span * shrink / steps
        zero = torch.zeros_like(span) if symmetric or always_zero else torch.round(-low * shrink / scale)
        # the squared error of `quantize_nearest`, relative to the range, in one tensor that stays in the cache
        torch.div(values, scale, out=work).round_().add_(zero).clamp_(*bounds).sub_(zero).mul_(scale)
        torch.sub(values, work, out=work).div_(span).square_()
        error = (work if weights is None else work.mul_(weights)).mean(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


FITTED_RULE = "least_squares"  # of all presets but `published`
PUBLISHED_RULES = ("max", "max_scale", "mse")  # the width of a published file is inferred from their scales


def choose_qparams(
    x: Tensor,
    n_bits: int,
    *,
    symmetric: bool = False,
    channel_wise: bool = False,
    method: str = "max",
    always_zero: bool = False,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """The scale and zero point for `x` by a rule of `SCALE_RULES`.

    Args:
        x: the values, of any shape.
        n_bits: the width of the integers, 2 to 16.
        symmetric: signed integers without zero point.
        channel_wise: choose one scale for each index of the first dimension.
        method: the name of the rule.
        always_zero: force the zero point to 0 (attention probabilities).
        name: what a warning calls the quantizer.

    Returns:
        (scale, zero_point), float32: scalars, or [C, 1, ...] with `channel_wise`. Zero points are signed: `mse` gives
        negative ones for values that are all positive.

    Raises:
        ConfigError: no rule has this name.
    """
    values = x.detach().float().reshape(len(x), -1) if channel_wise else x.detach().float().reshape(1, -1)
    scale, zero_point = SCALE_RULES.get(method)(values, n_bits, symmetric, always_zero, name)
    shape = (len(x),) + (1,) * (x.dim() - 1) if channel_wise else ()
    return scale.reshape(shape), zero_point.reshape(shape)
