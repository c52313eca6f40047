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

from qdiff.quantizers import MIN_SCALE, qparams_from_range, quantize_nearest
from qdiff.utils.registry import Registry

MSE_CANDIDATES = 80  # ranges shrunk by 1.00, 0.99, ... 0.21
MSE_NORM = 2.4


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
