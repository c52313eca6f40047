"""Quantized layers: what replaces a convolution, a linear layer or an attention product.

A layer's `weight` is what the product really uses: full precision until `set_integers`, then the
dequantized integers, formed once, when they are first asked for. So a quantized weight costs nothing in a forward
pass, and no memory where the products run on integers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff import quantizers as Q


class TimestepGroups:
    """Finite time-step sets (TFMQ-DM, arXiv 2311.16503): which of the step sizes a row takes, by its time step.

    bounds: ascending; a row of time t belongs to set number (how many bounds are <= t).
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = torch.tensor(
            bounds, dtype=torch.float32, device="cpu"
        )  # also where networks are built on the meta device
        self.current: int | Tensor = 0

    def __len__(self) -> int:
        return len(self.bounds) + 1

    def set(self, t: Tensor) -> None:
        """Take the time steps [rows] of the rows that come next."""
        index = torch.bucketize(t.detach().float().contiguous(), self.bounds.to(t.device), right=True)
        same = bool((index == index[0]).all())
        self.current = int(index[0]) if same else index

    def of_rows(self, count: int, device: torch.device) -> Tensor:
        """The set of each of `count` rows; a row may have become several, one after the other (heads)."""
        if isinstance(self.current, int):
            return torch.full((count,), self.current, device=device)
        return self.current.to(device).repeat_interleave(count // len(self.current))

    def pick(self, values: Tensor, x: Tensor) -> Tensor:
        """From one value a set to a value for each row of `x`, or for all."""
        if isinstance(self.current, int):
            return values[self.current]
        return values[self.of_rows(len(x), x.device)].reshape(-1, *[1] * (x.dim() - 1))


class Quantizer(nn.Module):
    """What quantizers of activations and of weights have in common: `n_bits`, a scale and a zero point."""

    n_bits: int
    delta: Tensor
    zero_point: Tensor
    name = ""  # its path in the network, for messages

    @property
    def scale(self) -> Tensor:
        """The step size; `delta` in state dicts and files."""
        return self.delta

    @scale.setter
    def scale(self, value: Tensor) -> None:
        self.delta = value


class ActQuantizer(Quantizer):
    """Per-tensor activation quantizer: one step size, one zero point; of each time-step set, where there are `steps`.

    `enabled` switches it; `observer`, while set, sees every input before it is quantized.
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

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale = scale.detach().to(self.scale).clone()
        self.zero_point = zero_point.detach().to(self.zero_point).clone()

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(delta, zero_point) for the rows of `x`: scalars, or one for each row."""
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
        # clamp(round(x / delta) + z, low, high) - z, with the zero point folded into the bounds
        low, high = Q.integer_range(self.n_bits, self.symmetric)
        if self.symmetric or self.always_zero:
            return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)
        return torch.div(x, scale).round_().clamp_(low - zero_point, high - zero_point).mul_(scale)

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, symmetric={self.symmetric}, always_zero={self.always_zero}"


class WeightQuantizer(Quantizer):
    """Per-channel integers of one weight (or of one half of a split one): (integers - zero_point) * delta."""

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
        return (self.integers.to(self.scale.dtype) - self.zero_point) * self.scale


class QuantLayer(nn.Module):
    """A convolution or linear layer with quantized weight and input; subclasses give the product.

    `channels` is the dimension of the input channels, in the input and in the weight.

    Args:
        layer: the full-precision layer; its parameters are shared, not copied.
        split: input channels that belong to the first half of a concatenated input; 0: no split.
        steps: the time-step sets, where each has its own activation step size.
    """

    channels = 1

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
        self.split = split
        self.quantized = False
        self.rounding: list[Tensor] | None = None  # alpha of each half, while they are learned
        self.shape = layer.weight.shape
        self.register_buffer("_weight", layer.weight.detach(), persistent=False)
        self.bias = layer.bias
        for suffix, part in zip(("", "_0"), self._parts(self.weight), strict=False):
            setattr(self, f"weight_quantizer{suffix}", WeightQuantizer(tuple(part.shape), weight_bit, part.device))
            setattr(self, f"act_quantizer{suffix}", ActQuantizer(act_bit, a_sym, groups=groups))
        for name in getattr(layer, "__constants__", ()):  # in_channels, stride, ...: networks read them
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.copy_geometry(layer)

    def copy_geometry(self, layer: nn.Module) -> None:
        """Keep what the product needs besides weight and bias."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def weight_quantizers(self) -> list[WeightQuantizer]:
        return [self.weight_quantizer] + ([self.weight_quantizer_0] if self.split else [])

    @property
    def act_quantizers(self) -> list[ActQuantizer]:
        return [self.act_quantizer] + ([self.act_quantizer_0] if self.split else [])

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        """The halves of a weight or of an input along the input channels, or the whole."""
        return list(tensor.tensor_split([self.split], dim=self.channels)) if self.split else [tensor]

    def _join(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.channels)

    def set_integers(self, integers: list[Tensor]) -> None:
        """Fix the weight to `integers` (one tensor a half); from now on `weight` is their dequantized value."""
        for quantizer, values in zip(self.weight_quantizers, integers, strict=True):
            quantizer.integers = values.detach().to(quantizer.integers.dtype)
        self.freeze()

    def freeze(self) -> None:
        """From now on the weight is that of the integers, in the precision of the scales."""
        self._weight = None
        self.quantized = True
        self.rounding = None

    def drop_weight(self) -> None:
        """Forget integers and weight: another module holds the only copy from now on, and only `product` can be used."""
        for quantizer in self.weight_quantizers:
            quantizer.integers = quantizer.integers.new_zeros(0)
        self._weight = None

    @property
    def weight(self) -> Tensor:
        if self._weight is None:
            with torch.no_grad():
                self._weight = self._join([quantizer.dequantize() for quantizer in self.weight_quantizers])
        return self._weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._weight = value

    @torch.no_grad()
    def init_weight_scales(self, method: str) -> None:
        """Step sizes from the full-precision weight, and nearest rounding."""
        integers = []
        for quantizer, part in zip(self.weight_quantizers, self._parts(self.weight), strict=True):
            quantizer.scale, quantizer.zero_point = Q.choose_qparams(
                part, quantizer.n_bits, channel_wise=True, method=method, name=quantizer.name
            )
            integers.append(Q.quantize_nearest(part, quantizer.scale, quantizer.zero_point, quantizer.n_bits))
        self.set_integers(integers)

    def effective_weight(self) -> Tensor:
        """The weight of the product: soft-rounded while alphas are learned, else `weight`."""
        if self.rounding is None:
            return self.weight
        parts = zip(self.weight_quantizers, self._parts(self.weight), self.rounding, strict=True)
        return self._join([Q.soft_round(w, alpha, q.scale, q.zero_point, q.n_bits) for q, w, alpha in parts])

    def quantize_input(self, x: Tensor) -> Tensor:
        """The input as the product sees it."""
        if not self.split:
            return self.act_quantizer(x)
        halves = zip(self.act_quantizers, self._parts(x), strict=True)
        return self._join([quantizer(half) for quantizer, half in halves]) if self._acts_matter() else x

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.quantize_input(x), self.effective_weight())

    def _acts_matter(self) -> bool:
        return any(q.enabled or q.observer is not None for q in self.act_quantizers)

    def _apply(self, fn: Callable, recurse: bool = True) -> "QuantLayer":
        """After a change of precision or device the dequantized weight is formed anew from the integers."""
        super()._apply(fn, recurse)
        if self.quantized:
            self.freeze()
        return self

    def extra_repr(self) -> str:
        return f"weight={tuple(self.shape)}, split={self.split}"


LAYER_TYPES: dict[type[nn.Module], type[QuantLayer]] = {}


def register_layer(float_type: type[nn.Module]) -> Callable[[type[QuantLayer]], type[QuantLayer]]:
    """Class decorator: the quantized layer that replaces `float_type`."""

    def register(quantized_type: type[QuantLayer]) -> type[QuantLayer]:
        LAYER_TYPES[float_type] = quantized_type
        return quantized_type

    return register


@register_layer(nn.Linear)
class QuantLinear(QuantLayer):
    channels = -1

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class _QuantConv(QuantLayer):
    def copy_geometry(self, layer: nn.Module) -> None:
        if layer.padding_mode != "zeros":
            raise NotImplementedError(f"padding_mode {layer.padding_mode!r}: only zeros can be quantized")
        self.geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


@register_layer(nn.Conv1d)
class QuantConv1d(_QuantConv):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv1d(x, weight, self.bias, **self.geometry)


@register_layer(nn.Conv2d)
class QuantConv2d(_QuantConv):
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, **self.geometry)


class MatMul(nn.Module):
    """`torch.matmul` as a module: the handle by which an attention product is quantized.

    whole_batch: the rows of the operands must be all those of the batch, not a slice of them.
    """

    whole_batch = False

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v of [B, T, d] by PyTorch's fused operator, for attentions whose products are not quantized.

    An attention module that can use it has a class attribute `fused`, which engines set.
    """
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]


class QuantMatMul(nn.Module):
    """A matrix product with both operands quantized; `operands` names them (`act_quantizer_q`, ...)."""

    def __init__(self, operands: dict[str, ActQuantizer]) -> None:
        super().__init__()
        for name, quantizer in operands.items():
            self.add_module(f"act_quantizer_{name}", quantizer)

    @property
    def act_quantizers(self) -> list[ActQuantizer]:
        return [module for module in self.children() if isinstance(module, ActQuantizer)]

    @property
    def whole_batch(self) -> bool:
        """With time-step sets each row has its own step size, found by its place in the batch."""
        return any(
            q.groups is not None and (q.observer is not None or not isinstance(q.groups.current, int))
            for q in self.act_quantizers
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        first, second = self.act_quantizers
        return torch.matmul(first(a), second(b))
