"""Quantized layers: the modules that replace convolutions, linear layers and attention matmuls.

A layer's `weight` is what its forward pass uses: the full-precision weight until `set_integers`, then the dequantized
integers. These are computed once, on first use. So a quantized weight costs nothing in a forward pass, and its
dequantized form takes no memory if an engine computes on the integers themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff import quantizers as Q
from qdiff.scale_rules import choose_qparams


class TimestepGroups:
    """Timestep groups (TFMQ-DM, arXiv 2311.16503): each group of time steps has activation scales of its own.

    Args:
        bounds: ascending time steps between the groups. The number of bounds <= t is the group of a sample at time t.

    Attributes:
        bounds: float32 [G - 1].
        current: the group of the samples that come next: one number if all share it, else a tensor [N].
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        # the device is named because networks are also built on the meta device
        self.bounds = torch.tensor(bounds, dtype=torch.float32, device="cpu")
        self.current: int | Tensor = 0

    def __len__(self) -> int:
        return len(self.bounds) + 1

    def set(self, t: Tensor) -> None:
        """Choose the groups of the samples that come next by their time steps `t` [N]."""
        index = torch.bucketize(t.detach().float().contiguous(), self.bounds.to(t.device), right=True)
        same = bool((index == index[0]).all())
        self.current = int(index[0]) if same else index

    def of_rows(self, count: int, device: torch.device) -> Tensor:
        """The group of each of `count` rows, [count].

        Attention heads turn one sample into several rows, one after the other: then `count` is a multiple of N.
        """
        if isinstance(self.current, int):
            return torch.full((count,), self.current, device=device)
        return self.current.to(device).repeat_interleave(count // len(self.current))

    def pick(self, values: Tensor, x: Tensor) -> Tensor:
        """Select from `values` [G] the value of each row of `x`: a scalar, or [rows, 1, ...] if the groups differ."""
        if isinstance(self.current, int):
            return values[self.current]
        return values[self.of_rows(len(x), x.device)].reshape(-1, *[1] * (x.dim() - 1))


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(integers - zero_point) * scale, in the precision of `scale`; shapes that broadcast."""
    return (integers.to(scale.dtype) - zero_point) * scale


class Quantizer(nn.Module):
    """The common base of activation and weight quantizers.

    Attributes:
        n_bits: the width of the integers.
        delta: the scale, under the name that state dicts and files use.
        zero_point: of the shape of the scale.
        name: the quantizer's path in the network, for messages.
    """

    n_bits: int
    delta: Tensor
    zero_point: Tensor
    name = ""

    @property
    def scale(self) -> Tensor:
        """The scale; state dicts and files call it `delta`."""
        return self.delta

    @scale.setter
    def scale(self, value: Tensor) -> None:
        self.delta = value


class ActQuantizer(Quantizer):
    """Per-tensor activation quantizer with one scale and one zero point, or with one of each for every timestep group.

    Args:
        n_bits: the width of the integers, 2 to 16.
        symmetric: signed integers without zero point.
        always_zero: unsigned integers whose zero point is 0 (attention probabilities).
        is_softmax: the input holds attention probabilities.
        groups: the timestep groups, shared by the whole network; None: one scale for all time steps.

    Attributes:
        enabled: whether inputs are quantized.
        learning: whether the forward pass is differentiable in the scale.
        observer: if set, it is called with every input before quantization.
    """

    def __init__(
        self,
        n_bits: int,
        symmetric: bool,
        always_zero: bool = False,
        is_softmax: bool = False,
        groups: TimestepGroups | None = None,
    ) -> None:
        super().__init__()
        self.n_bits, self.symmetric, self.always_zero, self.is_softmax = n_bits, symmetric, always_zero, is_softmax
        self.groups = groups
        self.enabled = False
        self.learning = False
        self.observer: Callable[[Tensor], None] | None = None
        shape = (len(groups),) if groups else ()
        self.register_buffer("delta", torch.full(shape, float("nan")))
        self.register_buffer("zero_point", torch.zeros(shape))

    @property
    def zero_is_fixed(self) -> bool:
        """Whether the number format fixes the zero point to 0; then `zero_point` is not read."""
        return self.symmetric or self.always_zero

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store copies of a scale and a zero point: scalars, or [G] with timestep groups."""
        self.scale = scale.detach().to(self.scale).clone()
        self.zero_point = zero_point.detach().to(self.zero_point).clone()

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) for the rows of `x`: scalars, or one value for each row."""
        if self.groups is None:
            return self.scale, self.zero_point
        return self.groups.pick(self.scale, x), self.groups.pick(self.zero_point, x)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(x)
        if not self.enabled:
            return x
        scale, zero_point = self.qparams(x)
        if self.learning:
            return Q.fake_quantize(x, scale, zero_point, self.n_bits, self.symmetric)
        # clamp(round(x / scale) + z, low, high) - z, with z folded into the bounds. This needs one new tensor and two
        # passes fewer than `Q.fake_quantize`, which adds and subtracts z and so rounds differently in low precision.
        low, high = Q.integer_range(self.n_bits, self.symmetric)
        if self.zero_is_fixed:
            return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)
        return torch.div(x, scale).round_().clamp_(low - zero_point, high - zero_point).mul_(scale)

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, symmetric={self.symmetric}, always_zero={self.always_zero}"


class WeightQuantizer(Quantizer):
    """The integers of one weight, or of one half of a split weight, with a scale and a zero point per output channel.

    Args:
        shape: the shape of the weight (half), [N, K] or [N, C, ...].
        n_bits: the width of the integers, 2 to 16.
        device: where the buffers are.
    """

    integers: Tensor

    def __init__(self, shape: tuple[int, ...], n_bits: int, device: torch.device) -> None:
        super().__init__()
        self.n_bits = n_bits
        scale_shape = (shape[0],) + (1,) * (len(shape) - 1)
        dtype = torch.uint8 if n_bits <= 8 else torch.int32
        self.register_buffer("delta", torch.full(scale_shape, float("nan"), device=device))
        self.register_buffer("zero_point", torch.zeros(scale_shape, device=device))
        self.register_buffer("integers", torch.zeros(shape, dtype=dtype, device=device))

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for."""
        return dequantize(self.integers, self.scale, self.zero_point)


class QuantLayer(nn.Module):
    """A convolution or linear layer with quantized weight and input; subclasses define `apply_weight`.

    Args:
        layer: the full-precision layer; its parameters are shared, not copied.
        weight_bit: the width of the weight's integers.
        act_bit: the width of the input's integers.
        a_sym: the input's integers are signed and have no zero point.
        split: the number of input channels in the first half of a concatenated input; 0 means one quantizer for all.
        groups: the timestep groups of the activation scales; None: one scale for all time steps.

    Attributes:
        channels: the dimension of the input channels, in the input and in the weight.
        quantized: whether the weight is that of the integers.
        rounding: AdaRound's alpha of each half while it is learned, else None.
        shape: the shape of the whole weight, valid after `drop_weight` too.
        smoothing: float32 [C], a factor for each input channel (SmoothQuant, arXiv 2211.10438): the input is divided by
            it before it is quantized, and the weight is that of the layer times it. None: there is none.
        weight_quantizer_0: the quantizer of the second half, in split layers only (`act_quantizer_0` likewise).
    """

    channels = 1
    bias: Tensor | None
    shape: torch.Size
    weight_quantizer: WeightQuantizer
    weight_quantizer_0: WeightQuantizer
    act_quantizer: ActQuantizer
    act_quantizer_0: ActQuantizer
    smoothing: Tensor | None
    _weight: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weight_bit: int,
        act_bit: int,
        a_sym: bool,
        split: int = 0,
        groups: TimestepGroups | None = None,
    ) -> None:
        super().__init__()
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        self.split = split
        self.quantized = False
        self.rounding: list[Tensor] | None = None
        self.shape = weight.shape
        self.register_buffer("_weight", weight.detach(), persistent=False)
        self.register_buffer("smoothing", None)
        self.bias = bias
        for suffix, part in zip(("", "_0"), self._parts(self.weight), strict=False):
            setattr(self, f"weight_quantizer{suffix}", WeightQuantizer(tuple(part.shape), weight_bit, part.device))
            setattr(self, f"act_quantizer{suffix}", ActQuantizer(act_bit, a_sym, groups=groups))
        for name in getattr(layer, "__constants__", ()):  # networks read them: in_channels, stride, ...
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.copy_geometry(layer)

    def copy_geometry(self, layer: nn.Module) -> None:
        """Copy from `layer` what `apply_weight` needs besides weight and bias."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution or linear map of an input with `weight`, plus the bias."""
        raise NotImplementedError

    @property
    def weight_quantizers(self) -> list[WeightQuantizer]:
        """The weight quantizer of the layer, or of both halves of a split layer."""
        return [self.weight_quantizer] + ([self.weight_quantizer_0] if self.split else [])

    def named_weight_quantizers(self) -> Iterator[tuple[str, WeightQuantizer]]:
        """Yield ("weight_quantizer", quantizer) and, in split layers, ("weight_quantizer_0", quantizer)."""
        return zip(("weight_quantizer", "weight_quantizer_0"), self.weight_quantizers, strict=False)

    @property
    def act_quantizers(self) -> list[ActQuantizer]:
        """The input quantizer of the layer, or of both halves of a split layer."""
        return [self.act_quantizer] + ([self.act_quantizer_0] if self.split else [])

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        """Split a weight or an input along the input channels into its halves; [tensor] in layers without split."""
        return list(tensor.tensor_split([self.split], dim=self.channels)) if self.split else [tensor]

    def _join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate the halves along the input channels: the inverse of `_parts`."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.channels)

    def smooth(self, factors: Tensor) -> None:
        """Divide the input by a factor for each input channel and multiply the weight by it.

        Args:
            factors: positive, float32 [C].

        Raises:
            ValueError: the layer has groups, whose weights do not see all input channels, or its integers are set.
        """
        if self.quantized or self.weight.shape[self.channels] != len(factors):
            raise ValueError(f"{len(factors)} factors for a weight {tuple(self.shape)}: expected one for each input")
        self.smoothing = factors.detach().float().to(self.weight.device)
        self.weight = self.weight * self._along_channels(self.smoothing, self.weight.dim())

    def _along_channels(self, values: Tensor, dims: int) -> Tensor:
        """`values` [C] in a shape that broadcasts along the input channels of a tensor of `dims` dimensions."""
        shape = [1] * dims
        shape[self.channels] = -1
        return values.view(shape)

    def set_integers(self, integers: list[Tensor]) -> None:
        """Fix the weight to `integers`, one tensor for each half; from now on `weight` is their dequantized value."""
        for quantizer, values in zip(self.weight_quantizers, integers, strict=True):
            quantizer.integers = values.detach().to(quantizer.integers.dtype)
        self.freeze()

    def freeze(self) -> None:
        """Let the integers define the weight from now on, in the precision of the scales."""
        self._weight = None
        self.quantized = True
        self.rounding = None

    def drop_weight(self) -> None:
        """Free integers and weight, because another module holds them; only `apply_weight` can be used afterwards."""
        for quantizer in self.weight_quantizers:
            quantizer.integers = quantizer.integers.new_zeros(0)
        self._weight = None

    @property
    def weight(self) -> Tensor:
        """The weight in full precision, or the dequantized integers once they are set."""
        if self._weight is None:
            with torch.no_grad():
                self._weight = self._join([quantizer.dequantize() for quantizer in self.weight_quantizers])
        return self._weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._weight = value

    @torch.no_grad()
    def init_weight_scales(self, method: str) -> None:
        """Choose weight scales from the full-precision weight and round to nearest.

        Args:
            method: the name of a scale rule (`qdiff.scale_rules`).
        """
        integers = []
        for quantizer, part in zip(self.weight_quantizers, self._parts(self.weight), strict=True):
            quantizer.scale, quantizer.zero_point = choose_qparams(
                part, quantizer.n_bits, channel_wise=True, method=method, name=quantizer.name
            )
            integers.append(Q.quantize_nearest(part, quantizer.scale, quantizer.zero_point, quantizer.n_bits))
        self.set_integers(integers)

    def effective_weight(self) -> Tensor:
        """The weight of the forward pass: soft-rounded while AdaRound learns, else `weight`."""
        if self.rounding is None:
            return self.weight
        parts = zip(self.weight_quantizers, self._parts(self.weight), self.rounding, strict=True)
        return self._join([Q.soft_round(w, alpha, q.scale, q.zero_point, q.n_bits) for q, w, alpha in parts])

    def quantize_input(self, x: Tensor) -> Tensor:
        """The input of the forward pass: smoothed, and quantized if the quantizers are enabled."""
        if self.smoothing is not None:
            x = x / self._along_channels(self.smoothing, x.dim()).to(x.dtype)
        if not self.split:
            return self.act_quantizer(x)
        if not any(quantizer.enabled or quantizer.observer is not None for quantizer in self.act_quantizers):
            return x  # saves the copy that joining the halves makes
        halves = zip(self.act_quantizers, self._parts(x), strict=True)
        return self._join([quantizer(half) for quantizer, half in halves])

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(self.quantize_input(x), self.effective_weight())

    def _apply(self, fn: Callable, recurse: bool = True) -> "QuantLayer":
        """After a change of precision or device, dequantize the integers again on next use."""
        super()._apply(fn, recurse)
        if self.quantized:
            self.freeze()
        return self

    def extra_repr(self) -> str:
        return f"weight={tuple(self.shape)}, split={self.split}"


LAYER_TYPES: dict[type[nn.Module], type[QuantLayer]] = {}


def register_layer(float_type: type[nn.Module]) -> Callable[[type[QuantLayer]], type[QuantLayer]]:
    """Class decorator that registers the quantized layer which replaces modules of type `float_type`."""

    def register(quantized_type: type[QuantLayer]) -> type[QuantLayer]:
        LAYER_TYPES[float_type] = quantized_type
        return quantized_type

    return register


@register_layer(nn.Linear)
class QuantLinear(QuantLayer):
    """A quantized linear layer."""

    channels = -1

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantConv(QuantLayer):
    """The common base of quantized convolutions.

    Attributes:
        geometry: stride, padding, dilation and groups, as the functional convolutions take them.
    """

    geometry: dict[str, Any]

    def copy_geometry(self, layer: nn.Module) -> None:
        if layer.padding_mode != "zeros":
            raise NotImplementedError(f"padding_mode {layer.padding_mode!r}: only zeros can be quantized")
        self.geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


@register_layer(nn.Conv1d)
class QuantConv1d(QuantConv):
    """A quantized 1-D convolution."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv1d(x, weight, self.bias, **self.geometry)


@register_layer(nn.Conv2d)
class QuantConv2d(QuantConv):
    """A quantized 2-D convolution."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, **self.geometry)


class MatMul(nn.Module):
    """`torch.matmul` as a module: wrapping replaces it by a `QuantMatMul` to quantize an attention matmul.

    Attributes:
        whole_batch: the operands must hold the whole batch, not a slice of it.
    """

    whole_batch = False

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v by PyTorch's fused operator, for attentions whose matmuls are not quantized.

    An attention module that can use it has a class attribute `fused`, which engines set.

    Args:
        q: [B, T, d].
        k: [B, S, d].
        v: [B, S, d].
        scale: the factor of the logits, usually d^-0.5.

    Returns:
        [B, T, d].
    """
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]


class QuantMatMul(nn.Module):
    """An attention matmul whose two operands are quantized.

    Args:
        operands: {operand: its quantizer} in the order of the factors; the modules are named `act_quantizer_{operand}`.
    """

    def __init__(self, operands: dict[str, ActQuantizer]) -> None:
        super().__init__()
        for name, quantizer in operands.items():
            self.add_module(f"act_quantizer_{name}", quantizer)

    @property
    def act_quantizers(self) -> list[ActQuantizer]:
        """The quantizers of the first and the second operand."""
        return [module for module in self.children() if isinstance(module, ActQuantizer)]

    @property
    def whole_batch(self) -> bool:
        """Whether the operands must hold the whole batch, because a row's scale is found by its place in the batch.

        This is so with timestep groups while samples of several groups are in the batch, or while an observer looks on.
        """
        return any(
            q.groups is not None and (q.observer is not None or not isinstance(q.groups.current, int))
            for q in self.act_quantizers
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        first, second = self.act_quantizers
        return torch.matmul(first(a), second(b))
