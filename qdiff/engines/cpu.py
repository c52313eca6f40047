"""The integer engine on CPU: a quantized network whose products run on int8 operators.

oneDNN's quantized operators ignore weight zero points, so they are taken out beforehand: the integers
are fed as q - z where that fits int8 (always at 4 bits with a zero point in range). Otherwise as q - 128; the rest is
(128 - z) times the sum of the inputs over the receptive field, which the quantization of the inputs gives along the way.
Sums of integers are exact; that rest is subtracted in float32. Without VNNI the 8-bit operators saturate silently: then the
simulation stays. Under autocast in bfloat16 what lies between the products is kept in it, and is no longer exact;
products from which a sum is still to be taken stay float32.
"""

import copy
import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff import quantizers as Q
from qdiff.engines.cpu_kernels import ChannelsLastView
from qdiff.engines.deferred import DeferredTensor, Epilogue, deferred, group_norm, plain_output
from qdiff.engines.proxy import ModuleProxy, has_engine
from qdiff.layers import ActQuantizer, QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, QuantMatMul, WeightQuantizer
from qdiff.model import has_own_behavior, replace_modules

log = logging.getLogger(__name__)


def to_integer(model: nn.Module) -> nn.Module:
    """A copy of a quantized network with integer products; integers and step sizes are shared, parameters are not.

    A network that is prepared already is returned as it is. Layers with hooks stay simulated.
    """
    if has_engine(model):
        return model
    shared = {id(tensor): tensor for tensor in model.buffers()}
    result = copy.deepcopy(model, shared).eval()

    def on_integers(_: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, QuantLayer):
            module.freeze()  # drops the copy's dequantized weight: it is formed again where a product stays simulated
        if type(module) is nn.GroupNorm:
            module.__class__ = DeferredGroupNorm
        return _INTEGER[type(module)](module) if type(module) in _INTEGER and not has_own_behavior(module) else None

    replace_modules(result, on_integers)
    result.register_forward_hook(plain_output)
    return result


def _between() -> torch.dtype:
    """The type of activations between the products."""
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return torch.bfloat16 if half else torch.float32


def _result(coef: Tensor | None) -> torch.dtype:
    """The type of a product: where a sum is taken out of it afterwards, bfloat16 would leave mostly its rounding."""
    return _between() if coef is None else torch.float32


def _fits(x: Tensor) -> bool:
    """Whether the operators can take an activation: on the CPU, no float64, not empty."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and x.numel() > 0


def _usable(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


def _qlinear(
    q: Tensor,
    scale: float,
    zero: int,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[rows, N] of bytes [rows, K] with scale and zero point, and prepacked int8 weights [N, K] with `scales` and `zeros` [N]."""
    return torch.ops.onednn.qlinear_pointwise(
        q, scale, zero, packed, scales, zeros, bias, 1.0, 0, dtype, "none", [], ""
    )


class _Input:
    """An activation quantizer as the operators want it: bytes, a scale and a zero point."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        low, high = Q.integer_range(quantizer.n_bits, quantizer.symmetric)
        self.quantizer = quantizer
        self.offset = 128 if quantizer.symmetric else 0
        self.low, self.high = low, high
        zeros = torch.zeros(()) if quantizer.symmetric or quantizer.always_zero else quantizer.zero_point
        self.whole = bool((zeros == zeros.round()).all())
        self.span = max(128, *((bound - zeros).abs().max().item() for bound in (low, high)))  # |q - zero point| at most
        self.fixed = None if quantizer.groups else self._of(quantizer.scale, quantizer.zero_point)

    def _of(self, scale: Tensor, zero_point: Tensor) -> tuple[float, int]:
        zero = 0 if self.quantizer.symmetric or self.quantizer.always_zero else int(zero_point.item())
        return scale.item(), zero

    def qparams(self) -> tuple[float, int]:
        """(delta, zero point) for the rows that come next; the zero point of the bytes is this plus `offset`."""
        if self.fixed is not None:
            return self.fixed
        current = self.quantizer.groups.current
        return self._of(self.quantizer.scale[current], self.quantizer.zero_point[current])

    def sums_fit(self, weight: "_Weight") -> bool:
        """Whether the zero point is a whole number and no sum of a product with `weight` leaves int32; then all is exact in float32 too."""
        largest = weight.integers.flatten(1).short().abs().sum(1).max().item()
        return self.whole and (self.span + 255) * max(largest, 128) < 2**31

    def mixed(self) -> bool:
        """Whether the rows belong to different time-step sets: then there is no one scale."""
        return self.fixed is None and not isinstance(self.quantizer.groups.current, int)

    def quantize(self, rows: ChannelsLastView, epilogue: Epilogue, signed: bool = False) -> "_Bytes":
        """The values after the pending work as bytes; signed: those minus 128."""
        scale, zero = self.qparams()
        # clamp(round(x / delta) + z, low, high) = clamp(round(x / delta), low - z, high - z) + z
        a, b = epilogue.affine()
        offset, dtype = (self.offset - 128, torch.int8) if signed else (self.offset, torch.uint8)
        q, sums = rows.quantize(a, b, epilogue.silu, scale, self.low - zero, self.high - zero, zero + offset, dtype)
        return _Bytes(q, scale, zero + offset, sums)


class _Bytes(NamedTuple):
    """Bytes [n, pixels, c], their scale and zero point, and their sums [n, pixels] in int32."""

    q: Tensor
    scale: float
    zero: int
    sums: Tensor

    def centered(self) -> Tensor:
        """The sums without the zero point."""
        return self.sums - self.q.shape[2] * self.zero


class _Weight:
    """Integers of a weight as int8 without zero point, with the correction where one is needed."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        z = quantizer.zero_point.double()
        exact = quantizer.integers.double() - z
        self.scales = quantizer.scale.flatten().float()
        self.corrected = bool((exact < -128).any() or (exact > 127).any() or (z != z.round()).any())
        if not self.corrected:
            self.integers, self.coef = exact.to(torch.int8), None
            return
        self.integers = (quantizer.integers.int() - 128).to(torch.int8)
        # y = scale * (sum (q - 128) x - (z - 128) sum x)
        self.coef = (self.scales.double() * (z.flatten() - 128)).float()

    def add_channel(self) -> None:
        """One more output channel, of zeros."""
        self.integers = torch.cat([self.integers, torch.zeros_like(self.integers[:1])])
        self.scales = torch.cat([self.scales, torch.ones(1)])

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """A copy in float32, with zeros for the channels that the layer does not have."""
        return (
            None
            if bias is None
            else torch.nn.functional.pad(bias.detach().float().clone(), (0, len(self.scales) - len(bias)))
        )


SLOW_MULTIPLE = (
    48  # oneDNN's convolutions block such numbers of output channels by 48, up to 7 times slower than one channel more
)


class CpuProxy(ModuleProxy):
    """Stands for the layer `simulated`. A copy is made from a copy of that, because prepacked weights cannot be copied.

    usable: whether it ever runs on integers.
    """

    usable: bool
    proxied = "simulated"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.simulated = layer

    def __reduce__(self) -> tuple:
        return type(self), (self.simulated,)


def _padding(layer: QuantConv2d) -> list[int] | None:
    """The padding of both sides in numbers; None for a `same` that pads one side more."""
    padding = layer.geometry["padding"]
    if padding == "valid":
        return [0, 0]
    if padding == "same":
        both = [
            dilation * (size - 1) for dilation, size in zip(layer.geometry["dilation"], layer.shape[2:], strict=True)
        ]
        return None if any(total % 2 for total in both) else [total // 2 for total in both]
    return list(padding)


class IntegerConv2d(CpuProxy):
    """A convolution of bytes with int8 weights; takes and gives lazy activations.

    With one input channel in a group it stays simulated: oneDNN's int8 operator is wrong for some of these.
    A kernel of one pixel is a linear layer over the pixels, and two to seven times faster as one.
    """

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__(layer)
        geometry = layer.geometry
        self.groups = geometry["groups"]
        self._stride = list(geometry["stride"])
        # along a side of one weight it means nothing, and makes oneDNN's int8 operator crash
        self._dilation = [1 if size == 1 else d for size, d in zip(layer.shape[2:], geometry["dilation"], strict=True)]
        self._padding = _padding(layer)
        self.split = layer.split
        one_pixel = layer.shape[2:] == (1, 1) and self._stride == [1, 1]
        self.pointwise = one_pixel and self._padding == [0, 0] and self.groups == 1
        self.inputs = [_Input(q) for q in layer.act_quantizers]
        weights = [_Weight(q) for q in layer.weight_quantizers]
        one_sum = self.groups == 1 or not any(
            w.corrected for w in weights
        )  # a sum over all channels is none of a group
        sums_fit = all(i.sums_fit(weight) for i, weight in zip(self.inputs, weights, strict=True))
        several = self.pointwise or min(weight.integers.shape[1] for weight in weights) > 1
        self.usable = one_sum and sums_fit and several and self._padding is not None
        self.in_channels, self.out_channels = layer.shape[1] * self.groups, layer.shape[0]
        self.ones = torch.ones(1, 1, *layer.shape[2:], dtype=torch.float64)
        biases = [layer.bias, *[None] * (len(weights) - 1)]
        self.parts = (
            [self._part_of(weight, bias) for weight, bias in zip(weights, biases, strict=True)] if self.usable else []
        )

    def _part_of(self, weight: _Weight, bias: Tensor | None) -> tuple:
        if not self.pointwise and self.groups == 1 and len(weight.scales) % SLOW_MULTIPLE == 0:
            weight.add_channel()
        zeros = torch.zeros(len(weight.scales), dtype=torch.int32)
        return self._pack(weight), weight.scales, zeros, weight.bias(bias), weight.coef

    def _pack(self, weight: _Weight) -> Tensor:
        if self.pointwise:
            return torch.ops.onednn.qlinear_prepack(weight.integers.flatten(1), None)
        geometry = (self._stride, self._padding, self._dilation, self.groups)
        return torch.ops.onednn.qconv_prepack(weight.integers, weight.scales, 1.0, 0, *geometry)

    def forward(self, x: Tensor) -> Tensor:
        source = deferred(x)
        if source is None or not self._takes(source):
            return self.simulated(x if not isinstance(x, DeferredTensor) else x.values())
        if not self.split:
            return self._product(source, source.rows, source.epilogue, 0)
        values = source.read()  # [N, C, H, W] in channels_last memory: a half is a range of columns
        n, _, h, w = values.shape
        first, second = (
            self._product(part, ChannelsLastView(part, n, h * w, part.shape[1], values.stride(3)), Epilogue(), index)
            for index, part in enumerate((values[:, : self.split], values[:, self.split :]))
        )
        return first + second

    def _takes(self, x: DeferredTensor) -> bool:
        return self.usable and x.shape4()[1] == self.in_channels and not any(i.mixed() for i in self.inputs)

    def _product(self, shaped: Tensor, rows: ChannelsLastView, epilogue: Epilogue, index: int) -> Tensor:
        n, c, h, w = shaped.shape
        x = self.inputs[index].quantize(rows, epilogue)
        packed, scales, zeros, bias, coef = self.parts[index]
        if self.pointwise:
            y = _qlinear(x.q.view(n * h * w, c), x.scale, x.zero, packed, scales, zeros, bias, _result(coef))
            y = y.view(n, h, w, -1).permute(0, 3, 1, 2)
        else:
            q = x.q.view(n, h, w, c).permute(0, 3, 1, 2)
            form = (self._stride, self._padding, self._dilation, self.groups, 1.0, 0, _result(coef), "none", [], "")
            y = torch.ops.onednn.qconv2d_pointwise(q, x.scale, x.zero, packed, scales, zeros, bias, *form)
            y = y.contiguous(memory_format=torch.channels_last)
        _, wide, height, width = y.shape
        sums = (
            None
            if coef is None
            else self._receptive(x.centered().view(n, 1, h, w)).mul_(x.scale).float().view(n, height * width)
        )
        return DeferredTensor.of(
            y[:, : self.out_channels],
            ChannelsLastView(y, n, height * width, self.out_channels, wide, coef, sums),
            Epilogue(),
        )

    def _receptive(self, sums: Tensor) -> Tensor:
        """Sums over the channels [n, 1, h, w] to sums over the receptive fields [n, 1, height, width], in float64."""
        sums = sums.double()
        return sums if self.pointwise else F.conv2d(sums, self.ones, None, self._stride, self._padding, self._dilation)


class _Linear:
    """A product of bytes [rows, K] with int8 weights [N, K]."""

    def __init__(self, quantizer: WeightQuantizer, act: ActQuantizer, bias: Tensor | None) -> None:
        found = _Weight(quantizer)
        self.input, self.coef, self.scales, self.bias = _Input(act), found.coef, found.scales, found.bias(bias)
        self.usable = self.input.sums_fit(found)
        self.packed, self.channels = (
            torch.ops.onednn.qlinear_prepack(found.integers.flatten(1), None),
            found.integers.shape[1],
        )
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)

    def takes(self, x: Tensor, channels: int) -> bool:
        """Whether `x`, of so many channels, can be multiplied."""
        return self.usable and channels == self.channels and not self.input.mixed() and _fits(x)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, K] float32 or bfloat16, contiguous."""
        x = self.input.quantize(ChannelsLastView(x, 1, len(x), x.shape[1], x.shape[1]), Epilogue())
        y = _qlinear(x.q[0], x.scale, x.zero, self.packed, self.scales, self.zeros, self.bias, _result(self.coef))
        return (
            y
            if self.coef is None
            else y.addcmul_(x.centered().view(-1, 1) * x.scale, self.coef, value=-1).to(_between())
        )


class IntegerLinear(CpuProxy):
    """A linear layer; a split one stays simulated."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        self.linear = None if layer.split else _Linear(layer.weight_quantizer, layer.act_quantizer, layer.bias)
        self.usable = self.linear is not None and self.linear.usable

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is None or not self.linear.takes(x, x.shape[-1]):
            return self.simulated(x)
        return self.linear(_usable(x).reshape(-1, x.shape[-1]).contiguous()).reshape(*x.shape[:-1], -1)


class IntegerConv1d(CpuProxy):
    """A 1-D convolution of kernel size 1 as a product over the channels; others, and split ones, stay simulated."""

    def __init__(self, layer: QuantConv1d) -> None:
        super().__init__(layer)
        g = layer.geometry
        pointwise = layer.shape[2] == 1 and g["stride"] == (1,) and g["padding"] in ((0,), "valid") and g["groups"] == 1
        takes = pointwise and not layer.split
        self.linear = _Linear(layer.weight_quantizer, layer.act_quantizer, layer.bias) if takes else None
        self.usable = self.linear is not None and self.linear.usable

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is None or x.dim() != 3 or not self.linear.takes(x, x.shape[1]):
            return self.simulated(x)
        n, c, tokens = x.shape
        return (
            self.linear(_usable(x).transpose(1, 2).reshape(-1, c).contiguous()).reshape(n, tokens, -1).transpose(1, 2)
        )


class IntegerMatMul(CpuProxy):
    """A product of two activations on int8; wider than 8 bits (16-bit softmax) it stays simulated."""

    def __init__(self, product: QuantMatMul) -> None:
        super().__init__(product)
        first, second = product.act_quantizers
        self.inputs = (_Input(first), _Input(second))
        self.usable = all(q.n_bits <= 8 and q.enabled for q in (first, second)) and all(i.whole for i in self.inputs)

    def _takes(self, a: Tensor, b: Tensor) -> bool:
        batches = a.dim() == b.dim() >= 3 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
        # sum |p - zp| |q - zq| must stay below 2^31; that of bytes with zero points among them does up to K = 33,025
        # with K = 1 `_int_mm` leaves its result as it was
        sums_fit = a.shape[-1] > 1 and self.inputs[0].span * self.inputs[1].span * a.shape[-1] < 2**31
        return (
            self.usable and batches and sums_fit and _fits(a) and _fits(b) and not any(i.mixed() for i in self.inputs)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self._takes(a, b):
            return self.simulated(a, b)
        return self._product(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, M, K] x [B, K, N]."""
        p, q = (
            self._bytes(i, _usable(x)) for i, x in zip(self.inputs, (a, b.transpose(1, 2)), strict=True)
        )  # [B, M, K], [B, N, K]
        total = torch.empty(len(a), a.shape[1], b.shape[2], dtype=torch.int32)
        for x, y, result in zip(p.q, q.q, total, strict=True):
            torch._int_mm(x, y.t(), out=result)
        # sum (p - zp) (q - zq), in int32
        if q.zero:
            total -= q.zero * p.sums[:, :, None]
        if p.zero:
            total -= p.zero * q.centered()[:, None]
        return total.float().mul_(p.scale * q.scale).to(_between())

    @staticmethod
    def _bytes(source: _Input, x: Tensor) -> _Bytes:
        x = x.contiguous()
        n, rows, k = x.shape
        return source.quantize(ChannelsLastView(x, n, rows, k, k), Epilogue(), signed=True)


class DeferredGroupNorm(nn.GroupNorm):
    """A GroupNorm becomes one by its class alone: parameters and hooks stay."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


_INTEGER: dict[type[nn.Module], type[CpuProxy]] = {
    QuantConv2d: IntegerConv2d,
    QuantConv1d: IntegerConv1d,
    QuantLinear: IntegerLinear,
    QuantMatMul: IntegerMatMul,
}


def integer_form(layer: nn.Module) -> CpuProxy:
    """The integer form of a quantized layer or product; `usable` says whether it ever runs on integers.

    Raises:
        KeyError: there is none for this type of layer.
    """
    return _INTEGER[type(layer)](layer)
