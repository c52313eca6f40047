"""Quantized operands of the CPU engine: activations as bytes on an integer grid, and weights as int8.

oneDNN's quantized operators ignore weight zero points z, so weights are fed without them. The integers q - z are fed if
they fit int8, as they always do at 4 bits with a zero point in range. Otherwise q - 128 is fed, and the missing term,
(128 - z) times the sum of the inputs over the receptive field, is corrected: input quantization also gives these sums.

Inputs of 9 to 16 bits are two bytes, q = 256 high + low: the product is 256 times that of the upper bytes plus that of
the lower ones, with the same prepacked weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qdiff import quantizers as Q
from qdiff.engines import probe
from qdiff.engines.cpu_kernels import ChannelsLastView, IntegerGrid
from qdiff.engines.deferred import Epilogue
from qdiff.layers import ActQuantizer, QuantConv2d, WeightQuantizer


class QuantizedRows(NamedTuple):
    """Quantized activations: scale * (q - zero).

    Attributes:
        bytes: the bytes of q, uint8 or int8 [n, pixels, c] each, the lower ones first.
        scale: the scale of all values.
        zero: the zero point of q.
        sums: the sums of q over the channels, int32 [n, pixels].
    """

    bytes: list[Tensor]
    scale: float
    zero: int
    sums: Tensor

    def centered(self) -> Tensor:
        """The sums over the channels of q - zero, int32 [n, pixels]."""
        return self.sums - self.bytes[0].shape[2] * self.zero

    def terms(self) -> "list[Term]":
        """The terms whose sum the values are: one for each byte of the integers."""
        if len(self.bytes) == 1:
            return [Term(self.bytes[0], self.scale, self.zero)]
        low, high = self.bytes
        return [Term(high, 256 * self.scale, self.zero >> 8), Term(low, self.scale, self.zero & 255)]


class Term(NamedTuple):
    """Bytes that an operator takes: scale * (q - zero).

    Attributes:
        q: uint8 or int8 [n, pixels, c].
        scale: the scale of all values.
        zero: the zero point of `q`.
    """

    q: Tensor
    scale: float
    zero: int


class InputGrid:
    """The integer grid of an activation quantizer in the form of oneDNN's operators: bytes, a scale and a zero point.

    Args:
        quantizer: the activation quantizer.
        smoothing: what the input is divided by first, [C]; None: nothing.
        signed: the bytes are int8, 128 less than the unsigned ones; integers of two bytes are always unsigned.

    Attributes:
        wide: whether the integers have two bytes.
        whole: whether all zero points are whole numbers.
        span: the largest |q - zero point|, and at least 128.
        fixed: the grid; None with timestep groups, where it depends on the current group.
    """

    def __init__(self, quantizer: ActQuantizer, smoothing: Tensor | None = None, signed: bool = False) -> None:
        self.quantizer, self.smoothing, self.signed = quantizer, smoothing, signed
        self.wide = quantizer.n_bits > 8
        zeros = torch.zeros(()) if quantizer.zero_is_fixed else quantizer.zero_point
        self.whole = bool((zeros == zeros.round()).all())
        bounds = Q.integer_range(quantizer.n_bits, quantizer.symmetric)
        self.span = max(128, *((bound - zeros).abs().max().item() for bound in bounds))
        self.fixed = None if quantizer.groups else self._grid(quantizer.scale, quantizer.zero_point)

    def _grid(self, scale: Tensor, zero_point: Tensor) -> IntegerGrid:
        """The grid of a scale and a zero point of the quantizer."""
        quantizer = self.quantizer
        low, high = Q.integer_range(quantizer.n_bits, quantizer.symmetric)
        zero = 0 if quantizer.zero_is_fixed else int(zero_point.item())
        # clamp(round(x / scale) + z, low, high) = clamp(round(x / scale), low - z, high - z) + z
        bounds, dtype = (low - zero, high - zero), torch.int8 if self.signed else torch.uint8
        if quantizer.symmetric:  # to unsigned integers
            zero += 2**15 if self.wide else 2**7
        if self.wide:
            dtype = torch.uint16
            if quantizer.n_bits < 16:  # there is room to make the lower byte of the zero point 128: so the bytes of
                zero += (128 - zero) % 256  # values near 0 are near those of the zero point, and do not cancel out
        elif self.signed:
            zero -= 128
        return IntegerGrid(scale.item(), *bounds, zero, self.smoothing, dtype)

    def current(self) -> IntegerGrid:
        """The grid of the samples that come next."""
        if self.fixed is not None:
            return self.fixed
        groups = self.quantizer.groups
        assert groups is not None  # without groups the grid is fixed
        return self._grid(self.quantizer.scale[groups.current], self.quantizer.zero_point[groups.current])

    def is_ready(self) -> bool:
        """Whether the samples that come next are quantized, with a common scale: all of one timestep group."""
        groups = self.quantizer.groups
        return self.quantizer.enabled and (groups is None or isinstance(groups.current, int))

    def obstacle(self, weight: "Int8Weight") -> str | None:
        """Why products with `weight` are not exact; None: they are."""
        if not self.whole:
            return "fractional zero points"
        if weight.integers.short().abs().max().item() > probe.largest_exact_weight():
            return f"weights beyond {probe.LARGEST_IN_16_BITS} {probe.NO_VNNI}"
        top = 2**16 if self.wide else 2**8  # the unsigned integers are below it
        # |q - zero point| of the operands: of two bytes, the upper ones have at most span / 256 + 1, the lower ones 255
        byte_span = max(255, self.span / 256 + 1) if self.wide else self.span
        sums = (
            (byte_span + 255) * weight.integers.flatten(1).short().abs().sum(1).max().item(),  # of an operator
            (self.span + top) * weight.integers.shape[1],  # over the channels
            (self.span + top) * 128,  # float32 holds the integers less their zero points
        )
        return None if max(sums) < 2**31 else "sums beyond 32 bits"

    def quantize(self, rows: ChannelsLastView, epilogue: Epilogue) -> QuantizedRows:
        """Quantize activations.

        Args:
            rows: the stored values.
            epilogue: the deferred work, which is done first.
        """
        grid = self.current()
        q, sums = rows.quantize(epilogue.merged(), epilogue.silu, grid)
        return QuantizedRows(q, grid.scale, grid.zero, sums)


class Int8Weight:
    """The integers of a weight as int8 without zero point.

    Args:
        quantizer: the weight quantizer.

    Attributes:
        integers: int8 [N, ...].
        scales: float32 [N].
        whole: whether all zero points are whole numbers; otherwise only `coef` is right.
        zeros: int32 [N], what is still to be subtracted from `integers`; None: nothing.
        coef: float32 [N]; coef times the sum of the inputs is to be subtracted from the result; None: it is right.
    """

    zeros: Tensor | None
    coef: Tensor | None

    def __init__(self, quantizer: WeightQuantizer) -> None:
        z = quantizer.zero_point.double()
        ends = (end.double() - z.flatten() for end in torch.aminmax(quantizer.integers.flatten(1), dim=1))
        self.scales = quantizer.scale.flatten().float()
        self.whole = bool((z == z.round()).all())
        if not self.whole or any(bool(((end < -128) | (end > 127)).any()) for end in ends):
            self.integers = (quantizer.integers.int() - 128).to(torch.int8)
            self.zeros = (z.flatten() - 128).to(torch.int32)
            # y = scale * (sum (q - 128) x - (z - 128) sum x)
            self.coef = (self.scales.double() * (z.flatten() - 128)).float()
        else:
            self.integers = (quantizer.integers.int() - z.to(torch.int32)).to(torch.int8)
            self.zeros, self.coef = None, None

    def add_channel(self) -> None:
        """Append an output channel of zeros."""
        self.integers = torch.cat([self.integers, torch.zeros_like(self.integers[:1])])
        self.scales = torch.cat([self.scales, torch.ones(1)])

    def pad_bias(self, bias: Tensor | None) -> Tensor | None:
        """A copy of a layer's bias in float32, with zeros for channels that were appended."""
        if bias is None:
            return None
        return F.pad(bias.detach().float().clone(), (0, len(self.scales) - len(bias)))


def padding_sides(layer: QuantConv2d) -> list[int] | None:
    """The padding of a convolution at the top, bottom, left and right; None: it is not with zeros."""
    if layer.padding_mode != "zeros":
        return None
    padding = layer.geometry["padding"]
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        sides = zip(layer.geometry["dilation"], layer.shape[2:], strict=True)
        totals = [dilation * (size - 1) for dilation, size in sides]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    return [side for size in padding for side in (size, size)]
