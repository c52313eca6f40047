"""Quantized layers: the modules that replace convolutions, linear layers and attention matmuls.

A layer's `weight` is what its forward pass uses: the full-precision weight until `set_integers`, then the dequantized
integers. These are computed once, on first use. So a quantized weight costs nothing in a forward pass, and its
dequantized form takes no memory if an engine computes on the integers themselves.

Networks in half precision (bfloat16, float16) are computed as they are: scales, zero points and smoothing factors stay
float32, quantization is done in float32, and its results are rounded to the precision of the network.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qdiff import quantizers as Q
from qdiff.scale_rules import choose_qparams

HALF = (torch.bfloat16, torch.float16)


class TimestepGroups:
    """Timestep groups (TFMQ-DM, arXiv 2311.16503): each group of time steps has activation scales of its own.

    Args:
        bounds: ascending time steps between the groups. The number of bounds <= t is the group of a sample at time t.

    Attributes:
        bounds: float32 [G - 1], on the device of the last time steps.
        current: the group of the samples that come next: one number if all share it, else a tensor [N].
        picked: how often a value of the current group was chosen on the CPU.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        # the device is named because networks are also built on the meta device
        self.bounds = torch.tensor(bounds, dtype=torch.float32, device="cpu")
        self.current: int | Tensor = 0
        self.picked = 0

    def __len__(self) -> int:
        return len(self.bounds) + 1

    def set(self, t: Tensor) -> None:
        """Choose the groups of the samples that come next by their time steps `t` [N]."""
        if self.bounds.device != t.device:
            self.bounds = self.bounds.to(t.device)
        index = torch.bucketize(t.detach().float().contiguous(), self.bounds, right=True)
        numbers = index.tolist()  # the one time that the CPU waits for the GPU
        self.current = numbers[0] if len(set(numbers)) == 1 else index

    def of_rows(self, count: int, device: torch.device) -> Tensor:
        """The group of each of `count` rows, [count].

        Attention heads turn one sample into several rows, one after the other: then `count` is a multiple of N.
        """
        if isinstance(self.current, int):
            return torch.full((count,), self.current, device=device)
        return self.current.to(device).repeat_interleave(count // len(self.current))

    def pick(self, values: Tensor, x: Tensor) -> Tensor:
        """Select from `values` [G] the value of each row of `x`: a scalar, or [rows, 1, ...] if the groups differ."""
        self.picked += 1
        if isinstance(self.current, int):
            return values[self.current]
        return values[self.of_rows(len(x), x.device)].reshape(-1, *[1] * (x.dim() - 1))


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(integers - zero_point) * scale, in the precision of `scale`; shapes that broadcast."""
    return (integers.to(scale.dtype) - zero_point) * scale


def to_float32(x: Tensor) -> Tensor:
    """An activation of a network in half precision as float32, any other as it is.

    Under autocast, activations between the layers are of half precision too. They stay so.
    """
    return x.float() if x.dtype in HALF and not torch.is_autocast_enabled(x.device.type) else x


def to_precision(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input of a layer that computes in `dtype`.

    While a network in half precision is fitted, some weights are float32, and code that follows their type gives
    float32 inputs.
    """
    return x.to(dtype) if dtype in HALF and not torch.is_autocast_enabled(x.device.type) else x


class _Float32Buffers(nn.Module):
    """A module whose own floating-point buffers stay float32 when the network is converted to half precision."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in HALF and before[name].dtype not in HALF:
                setattr(self, name, before[name].to(buffer.device, torch.float32))
        return self


class Quantizer(_Float32Buffers):
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
        values = to_float32(x)
        return self._quantize(values) if values is x else self._quantize(values).to(x.dtype)

    def _quantize(self, x: Tensor) -> Tensor:
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


class QuantLayer(_Float32Buffers):
    """A convolution or linear layer with quantized weight and input; subclasses define `apply_weight`.

    The weight's first dimension is that of the output channels, in every kind of layer.

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
        dtype: the precision that the layer computes in.
        rounding: AdaRound's alpha of each half while it is learned, else None.
        learned_weight: gives the weight while it is fine-tuned, anew in each forward pass; else None.
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
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        weight = self.weight_of(layer)
        self.split, self.quantized = split, False
        self.rounding: list[Tensor] | None = None
        self.learned_weight: Callable[[], Tensor] | None = None
        self.shape, self.dtype = weight.shape, weight.dtype
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("smoothing", None)
        self.bias = bias
        for suffix, part in zip(("", "_0"), self._parts(self.weight), strict=False):
            setattr(self, f"weight_quantizer{suffix}", WeightQuantizer(tuple(part.shape), weight_bit, part.device))
            setattr(self, f"act_quantizer{suffix}", ActQuantizer(act_bit, a_sym, groups=groups).to(part.device))
        for name in getattr(layer, "__constants__", ()):  # networks read them: in_channels, stride, ...
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.copy_geometry(layer)

    @staticmethod
    def weight_of(layer: nn.Module) -> Tensor:
        """The weight of a full-precision layer, [N, C / groups, ...]."""
        assert isinstance(layer.weight, Tensor)
        return layer.weight.detach()

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
        return values.view([-1 if dim == self.channels % dims else 1 for dim in range(dims)])

    def set_integers(self, integers: list[Tensor]) -> None:
        """Fix the weight to `integers`, one tensor for each half; from now on `weight` is their dequantized value."""
        for quantizer, values in zip(self.weight_quantizers, integers, strict=True):
            quantizer.integers = values.detach().to(quantizer.integers.dtype)
        self.freeze()

    def freeze(self) -> None:
        """Let the integers define the weight from now on, in the precision of the scales."""
        self._weight = None
        self.quantized = True
        self.rounding = self.learned_weight = None

    def drop_weight(self) -> None:
        """Free integers and weight, because another module holds them; only `apply_weight` can be used afterwards."""
        for quantizer in self.weight_quantizers:
            quantizer.integers = quantizer.integers.new_zeros(0)
        self._weight = None

    @property
    def weight(self) -> Tensor:
        """The weight in full precision (float32 if it is smoothed), or the dequantized integers once they are set."""
        if self.learned_weight is not None:
            return self.learned_weight()
        if self._weight is None:
            with torch.no_grad():
                whole = self._join([quantizer.dequantize() for quantizer in self.weight_quantizers])
                self._weight = whole.to(self.dtype)
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
            return self.weight.to(self.dtype)
        parts = zip(self.weight_quantizers, self._parts(self.weight), self.rounding, strict=True)
        rounded = self._join([Q.soft_round(w, alpha, q.scale, q.zero_point, q.n_bits) for q, w, alpha in parts])
        return rounded.to(self.dtype)

    def quantize_input(self, x: Tensor) -> Tensor:
        """The input of the forward pass: smoothed, and quantized if the quantizers are enabled."""
        x = to_precision(x, self.dtype)
        values = x if self.smoothing is None else to_float32(x)
        is_half = values is not x
        if self.smoothing is not None:
            values = values / self._along_channels(self.smoothing, x.dim()).to(values.dtype)
        if not self.split:
            values = self.act_quantizer(values)
        elif any(quantizer.enabled or quantizer.observer is not None for quantizer in self.act_quantizers):
            halves = zip(self.act_quantizers, self._parts(values), strict=True)
            values = self._join([quantizer(half) for quantizer, half in halves])  # a copy, which is saved otherwise
        return values.to(x.dtype) if is_half else values

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.apply_weight(self.quantize_input(x), self.effective_weight(), *args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """After a change of precision or device, dequantize the integers again on next use."""
        device = self.weight_quantizer.scale.device
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        if self.quantized:
            self.freeze()
        return self

    def extra_repr(self) -> str:
        return f"weight={tuple(self.shape)}, split={self.split}"


LAYER_TYPES: dict[type[nn.Module], type[QuantLayer]] = {}


def has_own_behavior(module: nn.Module) -> bool:
    """Whether a module has hooks or its own `forward`, which a replacement of the module would lose."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


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
        padding_mode: how the input is continued beyond its borders, as in the full-precision layer.
        pads: with a padding mode other than `zeros`, what `F.pad` adds before the convolution; else None.
    """

    geometry: dict[str, Any]
    padding_mode: str
    pads: list[int] | None

    def copy_geometry(self, layer: nn.Module) -> None:
        self.geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        self.padding_mode = str(layer.padding_mode)
        sides: Any = layer._reversed_padding_repeated_twice
        self.pads = None if self.padding_mode == "zeros" else list(sides)

    def padded(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The input with its padding, and the geometry of the convolution that follows.

        Padding repeats values of the input, so it may come after their quantization.
        """
        if self.pads is None:
            return x, self.geometry
        return F.pad(x, self.pads, mode=self.padding_mode), self.geometry | {"padding": 0}


@register_layer(nn.Conv1d)
class QuantConv1d(QuantConv):
    """A quantized 1-D convolution."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        x, geometry = self.padded(x)
        return F.conv1d(x, weight, self.bias, **geometry)


@register_layer(nn.Conv2d)
class QuantConv2d(QuantConv):
    """A quantized 2-D convolution."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        x, geometry = self.padded(x)
        return F.conv2d(x, weight, self.bias, **geometry)


class QuantConvTranspose(QuantLayer):
    """The common base of quantized transposed convolutions.

    PyTorch holds their weights as [C, N / groups, ...]. Here they are [N, C / groups, ...] like those of convolutions,
    so that every output channel has a scale of its own.

    Attributes:
        geometry: stride, padding, dilation and groups, as the functional transposed convolutions take them.
        output_padding: what is added to one side of the output, for each dimension.
    """

    geometry: dict[str, Any]
    output_padding: tuple[int, ...]

    @staticmethod
    def weight_of(layer: nn.Module) -> Tensor:
        assert isinstance(layer.weight, Tensor) and isinstance(layer.groups, int)
        return _swap_channels(layer.weight.detach(), layer.groups)

    def copy_geometry(self, layer: nn.Module) -> None:
        self.geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}

    def arguments(self, x: Tensor, output_size: Sequence[int] | None) -> dict[str, Any]:
        """The keyword arguments of the functional transposed convolution.

        Args:
            x: the input.
            output_size: the size of the output, with or without its first two dimensions; None: the smallest possible
                one plus `output_padding`.
        """
        if output_size is None:
            return self.geometry | {"output_padding": self.output_padding}
        kernel = self.shape[2:]
        geometry = [self.geometry[name] for name in ("stride", "padding", "dilation")]
        smallest = [
            (size - 1) * stride - 2 * padding + dilation * (side - 1) + 1
            for size, side, stride, padding, dilation in zip(x.shape[-len(kernel) :], kernel, *geometry, strict=True)
        ]
        extra = tuple(size - least for size, least in zip(output_size[-len(kernel) :], smallest, strict=True))
        return self.geometry | {"output_padding": extra}


def multiply_accumulates(module: "QuantLayer | QuantMatMul", x: Tensor, output: Tensor) -> int:
    """The multiply-accumulates of a layer or attention matmul in a call with this first operand and output."""
    if isinstance(module, QuantMatMul):
        return output.numel() * x.shape[-1]
    if isinstance(module, QuantConvTranspose):
        times = x.numel() // (module.shape[1] * module.geometry["groups"])
    else:
        times = output.numel() // module.shape[0]
    return times * module.shape.numel()


def _swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Exchange input and output channels within each group: [A, B / groups, ...] becomes [B, A / groups, ...]."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@register_layer(nn.ConvTranspose1d)
class QuantConvTranspose1d(QuantConvTranspose):
    """A quantized 1-D transposed convolution."""

    def apply_weight(self, x: Tensor, weight: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        weight = _swap_channels(weight, self.geometry["groups"])
        return F.conv_transpose1d(x, weight, self.bias, **self.arguments(x, output_size))


@register_layer(nn.ConvTranspose2d)
class QuantConvTranspose2d(QuantConvTranspose):
    """A quantized 2-D transposed convolution."""

    def apply_weight(self, x: Tensor, weight: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        weight = _swap_channels(weight, self.geometry["groups"])
        return F.conv_transpose2d(x, weight, self.bias, **self.arguments(x, output_size))


# what computes a whole attention, see `fused_attention`
AttentionCore = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]


class MatMul(nn.Module):
    """`torch.matmul` as a module: wrapping replaces it by a `QuantMatMul` to quantize an attention matmul.

    Attributes:
        whole_batch: the operands must hold the whole batch, not a slice of it.
    """

    whole_batch = False

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, operand_scale: float) -> Tensor:
    """softmax(q k^T scale) v by PyTorch's fused operator, for attentions whose matmuls are not quantized.

    An attention module that can leave its whole computation to an engine has a class attribute `core`, which engines
    set to this function or to one of the same signature.

    Args:
        q: [N, T, heads, d].
        k: [N, S, heads, d].
        v: [N, S, heads, d].
        scale: the factor of the logits, usually d^-0.5.
        operand_scale: a factor of q and of k, which are quantized after it.

    Returns:
        [N, T, heads, d].
    """
    # PyTorch's fast forms want the channels side by side in memory; otherwise it computes all T x S logits
    q, k, v = (part.transpose(1, 2).contiguous() for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale * operand_scale**2).transpose(1, 2)


def attend_sparingly(attend: Callable[..., Tensor], *parts: Tensor | None) -> Tensor:
    """`attend(*parts)`, a part of an attention without randomness. On a GPU its activations do not stay in memory.

    They hold several tensors as large as the attention probabilities. If there are gradients, they are computed again
    in the backward pass (arXiv 1604.06174), one part after the other.
    """
    if torch.is_grad_enabled() and parts[0] is not None and parts[0].is_cuda:
        return checkpoint(attend, *parts, use_reentrant=False, preserve_rng_state=False)
    return attend(*parts)


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
