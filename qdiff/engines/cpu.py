"""The integer engine on CPU: a quantized network whose layers and attention matmuls run on oneDNN's int8 operators.

`to_integer` copies a network and replaces its quantized modules by the proxies below. A forward pass of a proxy

1. quantizes the input to bytes (`InputGrid`); deferred work such as GroupNorm and SiLU is done in the same pass, and so
   is the division by a smoothing;
2. multiplies the bytes with the prepacked int8 weight (`Int8Weight`), or with the bytes of the other operand;
3. corrects for the zero points that the operator ignored; convolutions defer this correction to the next operator.

`qdiff.engines.operands` says how weights do without zero points, and how inputs of 9 to 16 bits become two bytes.

Sums of integers are exact; the correction is subtracted in float32. Without VNNI the operators saturate silently if a
weight is larger than 64; such layers and attention matmuls stay simulated (`qdiff.engines.probe`). Under autocast in
bfloat16, activations between the layers are bfloat16 and no longer exact; a result that still awaits its correction
stays float32.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.engines import probe
from qdiff.engines.cpu_kernels import ChannelsLastView
from qdiff.engines.deferred import DeferredTensor, Epilogue, deferred, group_norm, plain_output
from qdiff.engines.operands import InputGrid, Int8Weight, QuantizedRows, Term, padding_sides
from qdiff.engines.proxy import ModuleProxy, has_engine
from qdiff.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, QuantMatMul
from qdiff.model import has_own_behavior, replace_modules

log = logging.getLogger(__name__)

# oneDNN's convolutions split these numbers of output channels into blocks of 48, which is up to 7 times slower than
# with one channel more
SLOW_MULTIPLE = 48
WIDE_WEIGHTS = "weights of more than 8 bits"


# --- preparing a network ---------------------------------------------------------------------------


def to_integer(model: nn.Module, min_depth: int = 0) -> nn.Module:
    """Copy a quantized network and let it multiply integers.

    Args:
        model: the quantized network, on the CPU. If an engine has prepared it, it is returned as it is.
        min_depth: attention matmuls that sum fewer products for each element stay simulated.

    Returns:
        A copy that shares integers and scales with `model`, but not its parameters. Layers with hooks stay simulated.
    """
    if has_engine(model):
        return model
    shared = {id(tensor): tensor for tensor in model.buffers()}
    result = copy.deepcopy(model, shared).eval()

    def replacement(_: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, QuantLayer):
            module.freeze()  # frees the copy's dequantized weight; a simulated layer computes it again
        if type(module) is nn.GroupNorm:
            module.__class__ = DeferredGroupNorm
        return _PROXIES[type(module)](module) if type(module) in _PROXIES and not has_own_behavior(module) else None

    replace_modules(result, replacement)
    for module in result.modules():
        if isinstance(module, IntegerMatMul):
            module.min_depth = min_depth
    result.register_forward_hook(plain_output)
    return result


def integer_form(layer: nn.Module) -> "CpuProxy":
    """Make the integer form of a quantized layer or attention matmul; its `obstacle` says why it stays simulated.

    Raises:
        KeyError: this type of layer has no integer form.
    """
    return _PROXIES[type(layer)](layer)


def find_obstacles(network: nn.Module) -> dict[str, str | None]:
    """Why layers and attention matmuls stay simulated.

    Args:
        network: a network that `to_integer` has prepared.

    Returns:
        For each quantized layer and attention matmul, by path, the reason; None: it runs on integers.
    """
    obstacles: dict[str, str | None] = {}
    inside = {id(module.simulated) for module in network.modules() if isinstance(module, CpuProxy)}
    for path, module in network.named_modules():
        if isinstance(module, CpuProxy):
            obstacles[path] = module.obstacle
        elif isinstance(module, QuantLayer | QuantMatMul) and id(module) not in inside:
            hooked = type(module) in _PROXIES  # then only a hook or a `forward` of its own keeps it
            obstacles[path] = "a hook" if hooked else f"no integer form of {type(module).__name__}"
    return obstacles


# --- types of activations --------------------------------------------------------------------------


def _activation_dtype() -> torch.dtype:
    """The type of activations between the layers."""
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return torch.bfloat16 if half else torch.float32


def _product_dtype(coef: Tensor | None) -> torch.dtype:
    """The type of an operator's result: float32 if it awaits a correction, of which bfloat16 leaves mostly rounding."""
    return _activation_dtype() if coef is None else torch.float32


def _is_supported(x: Tensor) -> bool:
    """Whether the operators can take an activation: it is on the CPU, not float64 and not empty."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and x.numel() > 0


def _to_supported_dtype(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


# --- products of bytes ------------------------------------------------------------------------------


@dataclass
class PackedPart:
    """What oneDNN's operators need of one weight.

    Attributes:
        packed: the prepacked int8 weight; None: it is prepacked on first use, because its best form depends on the
            shape of the input.
        scales: float32 [N].
        bias: float32 [N]; None: no bias.
        coef: see `Int8Weight`.
        zeros: int32 [N], all 0.
        integers: the weight, int8, until it is prepacked.
    """

    packed: Tensor | None
    scales: Tensor
    bias: Tensor | None
    coef: Tensor | None
    integers: Tensor | None = None

    def __post_init__(self) -> None:
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)


def _product(
    x: QuantizedRows, part: PackedPart, operator: Callable[[Term, Tensor | None, torch.dtype], Tensor]
) -> Tensor:
    """The product of quantized activations with a weight, before any correction.

    Args:
        x: the activations.
        part: the weight.
        operator: multiplies one term. It takes the term, the bias that is added (None: no bias) and the type of its
            result.
    """
    terms, dtype = x.terms(), _product_dtype(part.coef)
    if len(terms) == 1:
        return operator(terms[0], part.bias, dtype)
    first, second = terms
    y = operator(first, part.bias, torch.float32)
    y += operator(second, None, torch.float32)
    return y.to(dtype)


def _qlinear(x: QuantizedRows, part: PackedPart) -> Tensor:
    """The product [n * pixels, N] of quantized activations with a weight [N, K], before any correction."""

    def operator(term: Term, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        q = term.q.flatten(0, 1)
        weight = (part.packed, part.scales, part.zeros, bias)
        return torch.ops.onednn.qlinear_pointwise(q, term.scale, term.zero, *weight, 1.0, 0, dtype, "none", [], "")

    return _product(x, part, operator)


# --- proxies ---------------------------------------------------------------------------------------


class CpuProxy(ModuleProxy):
    """The base of the modules that stand in for a quantized layer or attention matmul.

    A copy is made from a copy of that layer, because prepacked weights cannot be copied.

    Attributes:
        simulated: the layer; it runs if integers cannot.
        obstacle: why the layer never runs on integers; None: it does.
    """

    simulated: nn.Module
    obstacle: str | None
    proxied = "simulated"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.simulated = layer

    def __reduce__(self) -> tuple:
        return type(self), (self.simulated,)


def _input_grids(layer: QuantLayer) -> list[InputGrid]:
    """The integer grid of the input, or of both halves of a split layer's input."""
    if layer.smoothing is None:
        return [InputGrid(quantizer) for quantizer in layer.act_quantizers]
    parts = layer.smoothing.tensor_split([layer.split]) if layer.split else [layer.smoothing]
    return [InputGrid(quantizer, part) for quantizer, part in zip(layer.act_quantizers, parts, strict=True)]


def _padding(layer: QuantConv2d) -> list[int] | None:
    """The padding of each dimension, the same on both sides; None for `same` with an odd total, or not with zeros."""
    sides = padding_sides(layer)
    return sides[::2] if sides is not None and sides[::2] == sides[1::2] else None


class IntegerConv2d(CpuProxy):
    """A convolution of bytes with int8 weights; it takes and returns deferred tensors.

    A kernel of one pixel runs as a linear layer over the pixels, which is two to seven times faster. A convolution with
    one input channel in a group stays simulated: oneDNN's int8 operator is wrong for some of these.
    """

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__(layer)
        self.groups = layer.geometry["groups"]
        self.split = layer.split
        self.in_channels, self.out_channels = layer.shape[1] * self.groups, layer.shape[0]
        self._stride = list(layer.geometry["stride"])
        # The dilation of a kernel of size 1 has no effect, but makes oneDNN's int8 operator crash.
        sizes = zip(layer.shape[2:], layer.geometry["dilation"], strict=True)
        self._dilation = [1 if size == 1 else dilation for size, dilation in sizes]
        padding = _padding(layer)
        self._padding = padding or []
        one_pixel = layer.shape[2:] == (1, 1) and self._stride == [1, 1]
        self.pointwise = one_pixel and padding == [0, 0] and self.groups == 1
        self.inputs = _input_grids(layer)
        weights = [Int8Weight(quantizer) for quantizer in layer.weight_quantizers if quantizer.n_bits <= 8]
        self.obstacle = self._find_obstacle(layer, weights)
        self.ones = torch.ones(1, 1, *layer.shape[2:], dtype=torch.float64)
        biases = [layer.bias, *[None] * (len(weights) - 1)]
        pairs = zip(weights, biases, strict=True) if self.obstacle is None else ()
        self.parts = [self._pack(weight, bias) for weight, bias in pairs]

    def _find_obstacle(self, layer: QuantConv2d, weights: list[Int8Weight]) -> str | None:
        """Why the layer does not run on integers; `weights` holds those of its weights that have at most 8 bits."""
        if len(weights) < len(layer.weight_quantizers):
            return WIDE_WEIGHTS
        if _padding(layer) is None:
            return "padding that the operators do not have"
        # Input quantization sums over all channels; a correction within groups would need a sum for each group.
        if self.groups > 1 and any(weight.coef is not None for weight in weights):
            return "weights of 8 bits in groups"
        if not self.pointwise and min(weight.integers.shape[1] for weight in weights) == 1:
            return "one input channel in a group"
        obstacles = (grid.obstacle(weight) for grid, weight in zip(self.inputs, weights, strict=True))
        return next(filter(None, obstacles), None)

    def _pack(self, weight: Int8Weight, bias: Tensor | None) -> PackedPart:
        if self.pointwise:
            packed = torch.ops.onednn.qlinear_prepack(weight.integers.flatten(1), None)
            return PackedPart(packed, weight.scales, weight.pad_bias(bias), weight.coef)
        if self.groups == 1 and len(weight.scales) % SLOW_MULTIPLE == 0:
            weight.add_channel()
        return PackedPart(None, weight.scales, weight.pad_bias(bias), weight.coef, weight.integers)

    def forward(self, x: Tensor) -> Tensor:
        source = deferred(x)
        if source is None or not self._takes(source):
            return self.simulated(x if not isinstance(x, DeferredTensor) else x.values())
        if not self.split:
            return self._convolve(source, source.rows, source.epilogue, 0)
        values = source.read()  # [N, C, H, W] in channels_last memory, where a half is a range of columns
        n, _, h, w = values.shape
        first, second = (
            self._convolve(part, ChannelsLastView(part, n, h * w, part.shape[1], values.stride(3)), Epilogue(), index)
            for index, part in enumerate((values[:, : self.split], values[:, self.split :]))
        )
        return first + second

    def _takes(self, x: DeferredTensor) -> bool:
        """Whether `x` can be convolved on integers."""
        ready = self.obstacle is None and all(grid.is_ready() for grid in self.inputs)
        return ready and x.shape4()[1] == self.in_channels

    def _convolve(self, shaped: Tensor, rows: ChannelsLastView, epilogue: Epilogue, index: int) -> Tensor:
        """Convolve one half of the input, or all of it.

        Args:
            shaped: a tensor of the shape of the input [N, C, H, W].
            rows: the stored values of the input.
            epilogue: the deferred work on them.
            index: the number of the half.
        """
        n, c, h, w = shaped.shape
        x = self.inputs[index].quantize(rows, epilogue)
        part = self.parts[index]
        if self.pointwise:
            y = _qlinear(x, part).view(n, h, w, -1).permute(0, 3, 1, 2)
        else:
            y = self._qconv(x, (n, h, w, c), part)
        _, wide, height, width = y.shape
        correction = None
        if part.coef is not None:
            sums = self._receptive(x.centered().view(n, 1, h, w)).mul_(x.scale).float()
            correction = (part.coef, sums.view(n, height * width))
        out = ChannelsLastView(y, n, height * width, self.out_channels, wide, correction)
        return DeferredTensor.of(y[:, : self.out_channels], out, Epilogue())

    def _qconv(self, x: QuantizedRows, shape: tuple[int, int, int, int], part: PackedPart) -> Tensor:
        """The convolution of quantized activations of the shape [n, h, w, c], before any correction."""
        n, h, w, c = shape
        geometry = (self._stride, self._padding, self._dilation, self.groups)
        if part.packed is None:
            # With the shape and whether there are zero points, the form is the one that the operator wants. Without
            # them it reorders the weight in every call, which takes up to half of its time.
            zero = int(any(term.zero for term in x.terms()))
            part.packed = torch.ops.onednn.qconv_prepack(part.integers, part.scales, 1.0, zero, *geometry, [n, c, h, w])
            part.integers = None

        def operator(term: Term, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
            q = term.q.view(shape).permute(0, 3, 1, 2)
            weight = (part.packed, part.scales, part.zeros, bias)
            y = torch.ops.onednn.qconv2d_pointwise(
                q, term.scale, term.zero, *weight, *geometry, 1.0, 0, dtype, "none", [], ""
            )
            return y.contiguous(memory_format=torch.channels_last)

        return _product(x, part, operator)

    def _receptive(self, sums: Tensor) -> Tensor:
        """Add up sums over the channels [n, 1, h, w] over the receptive fields, [n, 1, height, width] in float64."""
        sums = sums.double()
        return sums if self.pointwise else F.conv2d(sums, self.ones, None, self._stride, self._padding, self._dilation)


class Int8Map:
    """A linear map of bytes [rows, K] by an int8 weight [N, K].

    Args:
        layer: a layer that is a linear map of its input channels, without split, with a weight of at most 8 bits.

    Attributes:
        obstacle: why products with the weight are not exact; None: they are.
    """

    def __init__(self, layer: QuantLayer) -> None:
        weight = Int8Weight(layer.weight_quantizer)
        (self.input,) = _input_grids(layer)
        self.obstacle = self.input.obstacle(weight)
        self.channels = weight.integers.shape[1]
        packed = torch.ops.onednn.qlinear_prepack(weight.integers.flatten(1), None)
        self.part = PackedPart(packed, weight.scales, weight.pad_bias(layer.bias), weight.coef)

    def takes(self, x: Tensor, channels: int) -> bool:
        """Whether `x`, which has `channels` input channels, can be multiplied on integers."""
        return self.obstacle is None and channels == self.channels and self.input.is_ready() and _is_supported(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply `x` [rows, K], float32 or bfloat16, contiguous; [rows, N]."""
        quantized = self.input.quantize(ChannelsLastView(x, 1, len(x), x.shape[1], x.shape[1]), Epilogue())
        y = _qlinear(quantized, self.part)
        if self.part.coef is None:
            return y
        sums = quantized.centered().view(-1, 1) * quantized.scale
        return y.addcmul_(sums, self.part.coef, value=-1).to(_activation_dtype())


class MapProxy(CpuProxy):
    """The base of the proxies of layers that are a linear map of their input channels.

    Args:
        layer: the layer.
        obstacle: why its geometry is no such map; None: it is.
    """

    def __init__(self, layer: QuantLayer, obstacle: str | None = None) -> None:
        super().__init__(layer)
        self.obstacle = obstacle or _no_map(layer)
        self.linear: Int8Map | None = None
        if self.obstacle is None:
            self.linear = Int8Map(layer)
            self.obstacle = self.linear.obstacle


def _no_map(layer: QuantLayer) -> str | None:
    """Why a linear map does not run as an `Int8Map`; None: it does."""
    if layer.split:
        return "a split linear map"
    return WIDE_WEIGHTS if layer.weight_quantizer.n_bits > 8 else None


class IntegerLinear(MapProxy):
    """A linear layer; a split one stays simulated."""

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is None or not self.linear.takes(x, x.shape[-1]):
            return self.simulated(x)
        rows = _to_supported_dtype(x).reshape(-1, x.shape[-1]).contiguous()
        return self.linear(rows).reshape(*x.shape[:-1], -1)


class IntegerConv1d(MapProxy):
    """A 1-D convolution of kernel size 1 as a linear map of the channels; others, and split ones, stay simulated."""

    def __init__(self, layer: QuantConv1d) -> None:
        g = layer.geometry
        pointwise = layer.shape[2] == 1 and g["stride"] == (1,) and g["padding"] in ((0,), "valid") and g["groups"] == 1
        super().__init__(layer, None if pointwise else "a 1-D convolution of several values")

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is None or x.dim() != 3 or not self.linear.takes(x, x.shape[1]):
            return self.simulated(x)
        n, c, tokens = x.shape
        rows = _to_supported_dtype(x).transpose(1, 2).reshape(-1, c).contiguous()
        return self.linear(rows).reshape(n, tokens, -1).transpose(1, 2)


class IntegerMatMul(CpuProxy):
    """An attention matmul on int8; wider than 8 bits (16-bit softmax) it stays simulated.

    Attributes:
        min_depth: products that sum fewer terms stay simulated too.
    """

    def __init__(self, matmul: QuantMatMul, min_depth: int = 0) -> None:
        super().__init__(matmul)
        self.min_depth = min_depth
        self.inputs = [InputGrid(quantizer, signed=True) for quantizer in matmul.act_quantizers]
        self.obstacle = None if all(grid.whole for grid in self.inputs) else "fractional zero points"
        if any(grid.wide for grid in self.inputs):
            self.obstacle = "operands of more than 8 bits"
        elif not probe.attention_is_exact():
            self.obstacle = f"products of 8-bit operands {probe.NO_VNNI}"

    def __reduce__(self) -> tuple:
        return type(self), (self.simulated, self.min_depth)

    def _takes(self, a: Tensor, b: Tensor) -> bool:
        """Whether [..., M, K] and [..., K, N] can be multiplied on integers."""
        shapes = a.dim() == b.dim() >= 3 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
        # sum |p - zp| |q - zq| must stay below 2^31; the sum of the bytes themselves does up to K = 33,025.
        # With K = 1, `_int_mm` does not write its result.
        sums_fit = (
            a.shape[-1] >= max(2, self.min_depth) and self.inputs[0].span * self.inputs[1].span * a.shape[-1] < 2**31
        )
        supported = _is_supported(a) and _is_supported(b)
        ready = self.obstacle is None and all(grid.is_ready() for grid in self.inputs)
        return ready and shapes and sums_fit and supported

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self._takes(a, b):
            return self.simulated(a, b)
        return self._multiply(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])

    def _multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, M, K] x [B, K, N]."""
        p = self._quantize(self.inputs[0], a)  # [B, M, K]
        q = self._quantize(self.inputs[1], b.transpose(1, 2))  # [B, N, K]
        total = torch.empty(len(a), a.shape[1], b.shape[2], dtype=torch.int32)
        for x, y, result in zip(p.bytes[0], q.bytes[0], total, strict=True):
            torch._int_mm(x, y.t(), out=result)
        # sum (p - zp) (q - zq), in int32
        if q.zero:
            total -= q.zero * p.sums[:, :, None]
        if p.zero:
            total -= p.zero * q.centered()[:, None]
        return total.float().mul_(p.scale * q.scale).to(_activation_dtype())

    @staticmethod
    def _quantize(grid: InputGrid, x: Tensor) -> QuantizedRows:
        x = _to_supported_dtype(x).contiguous()
        n, rows, k = x.shape
        return grid.quantize(ChannelsLastView(x, n, rows, k, k), Epilogue())


class DeferredGroupNorm(nn.GroupNorm):
    """A GroupNorm that defers its normalization. An existing GroupNorm becomes one by its class, with its hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


_PROXIES: dict[type[nn.Module], type[CpuProxy]] = {
    QuantConv2d: IntegerConv2d,
    QuantConv1d: IntegerConv1d,
    QuantLinear: IntegerLinear,
    QuantMatMul: IntegerMatMul,
}
