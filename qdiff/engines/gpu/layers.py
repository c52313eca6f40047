"""The integer engine on CUDA: a quantized network whose layers and attentions run on the Triton kernels.

`to_integer` copies a network and replaces its quantized layers by the proxies below, its normalizations by deferred
ones, and the cores of its attentions. Weights are expanded to one int8 for each integer: q - z where that fits, as it
always does at 4 bits, so no zero point of the weight is left; otherwise q - 128, and the product is corrected by the
sums of its inputs. On request weights of up to 4 bits stay packed. What has no integer form stays a packed layer, which
dequantizes its weight on use.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.attention import AttentionForward
from qdiff.engines.cuda import PackedLayer, attentions, set_core
from qdiff.engines.deferred import Epilogue, plain_output
from qdiff.engines.gpu import launches
from qdiff.engines.gpu.activations import (
    DeviceGroupNorm,
    DeviceLayerNorm,
    DeviceRows,
    DeviceTensor,
    DeviceTokens,
    Launch,
    TokenRows,
    TokenWork,
    placeholder,
)
from qdiff.engines.operands import Int8Weight, padding_sides
from qdiff.engines.proxy import ModuleProxy, plain
from qdiff.layers import (
    HALF,
    ActQuantizer,
    QuantConv1d,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    QuantMatMul,
    TimestepGroups,
    WeightQuantizer,
)
from qdiff.model import act_quantizers, find_timestep_groups, has_own_behavior, quant_layers, replace_modules

NO_PADDING = (0, 0, 0, 0)


class GroupIndex(nn.Module):
    """The timestep group of the samples that come next, on the card, where the kernels read it.

    Args:
        groups: the timestep groups of the network; None: it has one scale for all time steps.
        device: the card.
    """

    index: Tensor

    def __init__(self, groups: TimestepGroups | None, device: torch.device) -> None:
        super().__init__()
        self.groups = groups
        with torch.inference_mode(False):  # it is written in every mode
            self.register_buffer("index", torch.zeros(1, dtype=torch.int32, device=device), persistent=False)

    def is_one_group(self) -> bool:
        """Whether the samples that come next share a group, and so their scales."""
        return self.groups is None or isinstance(self.groups.current, int)

    def update(self, *_: Any) -> None:
        """Write the current group to the card; a forward pre-hook of the network."""
        if self.groups is not None and isinstance(self.groups.current, int):
            self.index.fill_(self.groups.current)


def to_integer(model: nn.Module, obstacles: Mapping[str, str | None] | None = None, packed: bool = False) -> nn.Module:
    """Copy a quantized network and let it multiply integers on its card.

    Args:
        model: the quantized network.
        obstacles: what `find_obstacles` said of it; None: it is asked now.
        packed: keep weights of up to 4 bits packed, which takes half the memory and more instructions.

    Returns:
        A copy that shares scales, biases and norms with `model`. Its attribute `group_index` is the timestep group that
        the kernels read. Layers with hooks stay simulated.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    result = copy.deepcopy(model, shared).eval()
    obstacles = find_obstacles(model) if obstacles is None else obstacles
    device = next(iter(quant_layers(result).values())).weight_quantizer.scale.device
    index = result.group_index = GroupIndex(find_timestep_groups(result), device)
    for quantizer in act_quantizers(result).values():
        if quantizer.zero_is_fixed:  # kernels always read a zero point
            quantizer.zero_point = torch.zeros_like(quantizer.scale)

    def replacement(path: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) is nn.GroupNorm:
            layer.__class__ = DeviceGroupNorm
        if type(layer) is nn.LayerNorm:
            layer.__class__ = DeviceLayerNorm
        if not isinstance(layer, QuantLayer) or has_own_behavior(layer):
            return None
        return PackedLayer(layer) if obstacles[path] else _PROXIES[type(layer)](layer, index, packed)

    cores = list(_quantized_attentions(result))
    replace_modules(result, replacement)
    for path, qk, av, assign_core in cores:
        if obstacles[path] is None:
            assign_core(IntegerAttention(qk, av, index))
    result.register_forward_pre_hook(index.update)
    result.register_forward_hook(lambda _, __, output: plain_result(output))
    return result


def count_packed(network: nn.Module) -> int:
    """The layers of a network of `to_integer` with packed weights."""
    layers = [module for module in network.modules() if isinstance(module, IntegerProduct)]
    return sum(any(part.flat.dtype == torch.uint8 for part in layer.parts) for layer in layers)


def _quantized_attentions(
    model: nn.Module,
) -> Iterator[tuple[str, QuantMatMul, QuantMatMul, Callable[["IntegerAttention"], None]]]:
    """The attentions of a network whose matmuls are quantized: path, the two matmuls, and what takes a core."""
    found: list[tuple[str, list[nn.Module], Callable[[IntegerAttention], None]]] = []
    for path, module, matmuls in attentions(model):
        found.append((path, matmuls, partial(set_core, module)))
    for path, owner in model.named_modules():
        forward = vars(owner).get("forward")
        if isinstance(forward, AttentionForward):
            for number, names in forward.attentions():
                matmuls = [getattr(owner, name, nn.Identity()) for name in names]
                place = ".".join(filter(None, (path, names[0])))
                found.append((place, matmuls, partial(forward.cores.__setitem__, number)))
    for path, matmuls, assign_core in found:
        match matmuls:
            case [QuantMatMul() as qk, QuantMatMul() as av]:
                yield path, qk, av, assign_core


def plain_result(output: Any) -> Any:
    """The results of a whole network as ordinary tensors."""
    return plain_output(nn.Identity(), (), plain(output))


def find_obstacles(model: nn.Module) -> dict[str, str | None]:
    """Why layers and attentions of a quantized network cannot multiply integers, by path; None: they can.

    Args:
        model: the network, before `to_integer`.
    """
    obstacles = {path: find_obstacle(layer) for path, layer in quant_layers(model).items()}
    attending = {path: IntegerAttention.find_obstacle(qk, av) for path, qk, av, _ in _quantized_attentions(model)}
    return obstacles | attending


# --- what integers can do --------------------------------------------------------------------------


def _zeros(quantizer: ActQuantizer) -> Tensor:
    """The zero points of a quantizer, float32 [G]."""
    zeros = torch.zeros_like(quantizer.scale) if quantizer.zero_is_fixed else quantizer.zero_point
    return zeros.reshape(-1)


def _span(quantizer: ActQuantizer) -> float:
    """The largest |q - zero point| of a quantizer."""
    bounds = launches.ByteFormat(quantizer.n_bits, quantizer.symmetric).bounds
    return max((bound - _zeros(quantizer)).abs().max().item() for bound in bounds)


def find_obstacle(layer: QuantLayer) -> str | None:
    """Why a layer has no integer form, or why its products would not be exact; None: it has one."""
    if has_own_behavior(layer):
        return "a hook"
    if type(layer) not in _PROXIES:
        return f"no integer form of {type(layer).__name__}"
    if not all(quantizer.enabled for quantizer in layer.act_quantizers):
        return "activations that are not quantized"
    if any(quantizer.n_bits > 8 for quantizer in layer.weight_quantizers):
        return "weights of more than 8 bits"
    if isinstance(layer, QuantConv1d | QuantConv2d) and layer.geometry["groups"] > 1:
        return "groups of channels"
    if isinstance(layer, QuantConv1d):
        g = layer.geometry
        if layer.shape[2] != 1 or g["stride"] != (1,) or g["padding"] not in ((0,), "valid", "same"):
            return "a 1-D convolution that is no linear map"
    padded = False
    if isinstance(layer, QuantConv2d):
        if (padding := padding_sides(layer)) is None:
            return "padding that is not with zeros"
        padded = any(padding)
    pairs = zip(layer.act_quantizers, layer.weight_quantizers, strict=True)
    return next(filter(None, (_inexact(act, Int8Weight(weight), padded) for act, weight in pairs)), None)


def _inexact(act: ActQuantizer, weight: Int8Weight, padded: bool) -> str | None:
    """Why products of an input and a weight are not exact; None: they are."""
    zeros = _zeros(act)
    if bool((zeros != zeros.round()).any()):
        return "fractional zero points"
    if not weight.whole:
        return "fractional zero points of the weight"
    form = launches.ByteFormat(act.n_bits, act.symmetric)
    stored = [zero for value in zeros.tolist() for zero in form.stored_zeros(int(value))]
    if padded and not all(-128 <= zero <= 127 for zero in stored):
        return "zero points beyond a byte, with padding"
    integers = weight.integers.flatten(1).int()
    if weight.zeros is not None:
        integers = integers - weight.zeros[:, None]
    span = max(255, _span(act) / 256 + 1) if form.wide else _span(act)
    if integers.shape[1] > launches.SUM_LIMIT or span * integers.abs().sum(1).max().item() >= 2**31:
        return "sums beyond 32 bits"
    return None


class IntegerWeight(nn.Module):
    """The integers of a weight as the kernels read them.

    Args:
        quantizer: the weight quantizer; its integers are [OC, C], [OC, C, K] or [OC, C, KH, KW].
        packed: keep integers of up to 4 bits packed, two in a byte, if their zero points are of 4 bits too.

    Attributes:
        channels: the input channels with those that are added, whose integers are 0.
        missing: see `launches.product`, `weight_zero`.
        nibble_zero: see there.
    """

    flat: Tensor
    sums: Tensor
    scale: Tensor
    missing: Tensor | None
    nibble_zero: Tensor | None

    def __init__(self, quantizer: WeightQuantizer, packed: bool = False) -> None:
        super().__init__()
        weight = Int8Weight(quantizer)
        self.shape = tuple(weight.integers.shape)
        taps = weight.integers.reshape(*self.shape[:2], *([1, 1, *self.shape[2:]][-2:]))
        zeros = quantizer.zero_point.flatten()
        packed = packed and quantizer.n_bits <= 4 and bool(((zeros >= 0) & (zeros <= 15)).all())
        self.channels = launches.stored_channels(self.shape[1], packed)
        integers = taps.new_zeros(len(taps), *taps.shape[2:], self.channels)
        integers[..., : self.shape[1]] = taps.permute(0, 2, 3, 1)
        self.taps = tuple(taps.shape[2:])
        self.register_buffer("sums", integers.flatten(1).sum(1, dtype=torch.int32))
        self.register_buffer("scale", weight.scales)
        self.register_buffer("missing", None if weight.zeros is None else -weight.zeros)
        self.register_buffer("nibble_zero", zeros.to(torch.int8) if packed else None)
        if self.nibble_zero is not None:
            integers = launches.pack_nibbles(integers + self.nibble_zero.view(-1, 1, 1, 1))
        # flat, because a conversion of the network to channels_last memory reorders what has four dimensions
        self.register_buffer("flat", integers.flatten(1))

    @property
    def operand(self) -> Tensor:
        """The argument `weight` of `launches.product`."""
        return self.flat.view(len(self.flat), *self.taps, -1)

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        integers = self.operand
        if self.nibble_zero is not None:
            integers = launches.unpack_nibbles(integers).to(torch.int8) - self.nibble_zero.view(-1, 1, 1, 1)
        integers = integers[..., : self.shape[1]].permute(0, 3, 1, 2).float()
        if self.missing is not None:
            integers = integers + self.missing.view(-1, 1, 1, 1)
        return (integers * self.scale.view(-1, 1, 1, 1)).reshape(self.shape)


# --- layers ----------------------------------------------------------------------------------------


def _result_dtype(x: Tensor, layer: QuantLayer | None = None) -> torch.dtype:
    """The type of a product of `x`: that of autocast, that of a layer in half precision, or its own."""
    kind = x.device.type  # the meta device has no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return layer.dtype if layer is not None and layer.dtype in HALF else x.dtype


class IntegerProduct(ModuleProxy):
    """The common base of the layers that multiply integers.

    Args:
        layer: the layer, without an obstacle; its own integers are freed.
        index: the current timestep group.
        packed: see `IntegerWeight`.
    """

    layer: QuantLayer
    proxied = "layer"

    def __init__(self, layer: QuantLayer, index: GroupIndex, packed: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList([IntegerWeight(quantizer, packed) for quantizer in layer.weight_quantizers])
        self.layer, self.index = layer, index
        self.padding: tuple[int, ...] = NO_PADDING
        self.stride, self.dilation = (1, 1), (1, 1)
        layer.drop_weight()

    @property
    def weight(self) -> Tensor:
        """The dequantized weight."""
        return self.layer._join([part.dequantize() for part in self.parts if isinstance(part, IntegerWeight)])

    def is_ready(self, x: Tensor, channels: int, pixels: int) -> bool:
        """Whether the samples that come next share their scales, and the kernels take them.

        Args:
            x: the input.
            channels: its channels.
            pixels: all pixels of the input with its padding, or of the output, whichever are more.
        """
        quantized = all(quantizer.enabled for quantizer in self.layer.act_quantizers)
        fits = x.dtype in launches.DTYPES and channels == self.layer.shape[1] and x.numel() > 0
        stored = [part.channels for part in self.parts if isinstance(part, IntegerWeight)]
        largest = pixels * max(*stored, self.layer.shape[0], 2 * channels)
        return quantized and self.index.is_one_group() and fits and largest < launches.LARGEST

    def simulate(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer in floating point."""
        x = self.layer.quantize_input(x)
        return self.layer.apply_weight(x, self.weight.to(_result_dtype(x, self.layer)), *args, **kwargs)

    def _halves(self, tensor: Tensor | None, dim: int = -1) -> list[Any]:
        """A tensor in the halves of a split layer; None gives None for each."""
        if tensor is None:
            return [None] * len(self.parts)
        split = self.layer.split
        return list(tensor.tensor_split([split], dim=dim)) if split else [tensor]

    def _launch(self, x: Tensor, dtype: torch.dtype, work: dict[str, Any]) -> Launch:
        """Quantize an input; returns what launches the product.

        Args:
            x: [N, 1, H, W, C] with any strides.
            dtype: the type of the result.
            work: the pointwise work before the quantization, arguments of `launches.quantize`.
        """
        layer, index = self.layer, self.index
        works = [work | {"divisor": half} for half in self._halves(layer.smoothing)]
        for name in ("a", "b"):
            for part, half in zip(works, self._halves(work.get(name)), strict=True):
                part[name] = None if half is None else half.contiguous()
        terms: list[tuple[tuple, dict[str, Tensor | None]]] = []
        halves = zip(self._halves(x), works, layer.act_quantizers, self.parts, strict=True)
        for values, pointwise, act, weight in halves:
            assert isinstance(weight, IntegerWeight)
            form, corrects = launches.ByteFormat(act.n_bits, act.symmetric), weight.missing is not None
            common = (act.scale.reshape(-1), act.zero_point.reshape(-1), index.index, act.n_bits, act.symmetric)
            out = launches.quantize(values, *common, self.padding, weight.channels, corrects, **pointwise)
            low_first = [out[0]] if not form.wide else [out[1], out[0]]  # in the order of `terms`
            sums = ([out[-1]] if not form.wide else [out[-1], out[-2]]) if corrects else [None] * len(low_first)
            for term, q, total in zip(form.terms, low_first, sums, strict=True):
                arguments = (q, weight.operand, weight.sums, weight.scale, *common, term, self.stride, self.dilation)
                zeros = {"weight_zero": weight.missing, "nibble_zero": weight.nibble_zero}
                terms.append((arguments, {"sums": total} | zeros))
        return _Chain(terms, layer.bias, dtype)


class _Chain:
    """The products of the terms of one layer, each added to the one before.

    Args:
        terms: the arguments of `launches.product` for each term.
        bias: the bias, added to the last one.
        dtype: the type of the result; those of all terms but the last are float32.
    """

    def __init__(self, terms: list[tuple[tuple, dict[str, Tensor | None]]], bias: Tensor | None, dtype: torch.dtype):
        self.terms, self.dtype = terms, dtype
        self.bias = None if bias is None else bias.detach().float()

    def __call__(self, shift: Tensor | None, residual: Tensor | None) -> Tensor:
        for arguments, named in self.terms[:-1]:
            residual = launches.product(*arguments, torch.float32, **named, residual=residual)
        arguments, named = self.terms[-1]
        return launches.product(*arguments, self.dtype, **named, bias=self.bias, shift=shift, residual=residual)


class IntegerConv(IntegerProduct):
    """The common base of convolutions; they take and return deferred tensors."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if isinstance(x, DeviceTensor) else plain(x)
        source = x if isinstance(x, DeviceTensor) else DeviceTensor.wrap(x)
        if source is None or not self._takes(source):
            return self.simulate(plain(x))
        values, affine, silu = source.operand()
        a, b = affine or (None, None)
        dtype = _result_dtype(values, self.layer)
        launch = self._launch(values, dtype, {"a": a, "b": b, "silu": silu})
        shape = self._shape(source.shape4())
        return DeviceTensor.of(placeholder(shape, dtype), DeviceRows(None, values.device, launch), Epilogue())

    def _takes(self, x: DeviceTensor) -> bool:
        """Whether the kernels take an input."""
        shape = x.shape4()
        if len(shape) != len(self.layer.shape):
            return False
        height, width = shape[-2:] if len(shape) == 4 else (1, shape[2])
        padded = (height + sum(self.padding[:2])) * (width + sum(self.padding[2:]))
        return self.is_ready(x, shape[1], shape[0] * padded)

    def _shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the result."""
        raise NotImplementedError


class IntegerConv2d(IntegerConv):
    """A 2-D convolution."""

    def __init__(self, layer: QuantConv2d, index: GroupIndex, packed: bool = False) -> None:
        super().__init__(layer, index, packed)
        self.padding = tuple(padding_sides(layer) or NO_PADDING)
        self.stride, self.dilation = (tuple(layer.geometry[name]) for name in ("stride", "dilation"))

    def _shape(self, shape: torch.Size) -> tuple[int, ...]:
        pads = (self.padding[0] + self.padding[1], self.padding[2] + self.padding[3])
        sides = zip(shape[2:], pads, self.layer.shape[2:], self.stride, self.dilation, strict=True)
        return (shape[0], self.layer.shape[0], *((n + p - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in sides))


class IntegerConv1d(IntegerConv):
    """A 1-D convolution of kernel size 1."""

    def _shape(self, shape: torch.Size) -> tuple[int, ...]:
        return (shape[0], self.layer.shape[0], shape[2])


class IntegerLinear(IntegerProduct):
    """A linear layer; it takes and returns deferred tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if isinstance(x, DeviceTokens) else plain(x)
        if not self.is_ready(x, x.shape[-1], prod(x.shape[:-1])):
            return self.simulate(plain(x))
        work: dict[str, Any] = {}
        data = x
        if isinstance(x, DeviceTokens):
            if x.work.norm is not None and not self.layer.split:
                weight, bias, eps = x.work.norm
                work = {"a": weight.detach().float(), "b": bias.detach().float(), "layer_norm": eps}
                data = x.rows.plain()
            elif x.work.half == "geglu" and not self.layer.split:
                work, data = {"geglu": True}, x.rows.plain()
            elif x.work.silu:
                work, data = {"silu": True}, x.rows.plain()
            else:
                data = x.read()
        dtype = _result_dtype(data, self.layer)
        launch = self._launch(data.reshape(1, 1, 1, -1, data.shape[-1]), dtype, work)
        shape = torch.Size((*x.shape[:-1], self.layer.shape[0]))
        return DeviceTokens.of(TokenRows(None, shape, data.device, launch), TokenWork(), dtype)


_PROXIES: dict[type[nn.Module], type[IntegerProduct]] = {
    QuantConv2d: IntegerConv2d,
    QuantConv1d: IntegerConv1d,
    QuantLinear: IntegerLinear,
}


# --- attention -------------------------------------------------------------------------------------


class IntegerAttention:
    """The core of an attention on integers, see `qdiff.layers.fused_attention`.

    Args:
        qk: the quantized matmul of queries and keys; `find_obstacle` must find none.
        av: that of probabilities and values, in either order.
        index: the current timestep group.
    """

    def __init__(self, qk: QuantMatMul, av: QuantMatMul, index: GroupIndex) -> None:
        self.index = index
        p, v = sorted(av.act_quantizers, key=lambda quantizer: not quantizer.is_softmax)
        self.quantizers = [*qk.act_quantizers, v, p]

    @staticmethod
    def find_obstacle(qk: QuantMatMul, av: QuantMatMul) -> str | None:
        """Why an attention of these matmuls cannot run on integers; None: it can."""
        softmax = [quantizer for quantizer in av.act_quantizers if quantizer.is_softmax]
        others = [*qk.act_quantizers, *(quantizer for quantizer in av.act_quantizers if not quantizer.is_softmax)]
        if has_own_behavior(qk) or has_own_behavior(av):
            return "a hook"
        if len(softmax) != 1 or not all(quantizer.enabled for quantizer in [*others, *softmax]):
            return "operands that are not quantized"
        if any(quantizer.n_bits > 8 for quantizer in others):
            return "operands of more than 8 bits"
        if not all(bool((_zeros(q) == _zeros(q).round()).all()) for q in [*others, *softmax]):
            return "fractional zero points"
        if any(
            not -128 <= zero <= 127
            for quantizer in others
            for value in _zeros(quantizer).tolist()
            for zero in launches.ByteFormat(quantizer.n_bits, quantizer.symmetric).stored_zeros(int(value))
        ):
            return "zero points beyond a byte"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, operand_scale: float) -> Tensor:
        q, k, v = (plain(part) for part in (q, k, v))
        if not self.takes(q, k):
            return self._simulate(q * operand_scale, k * operand_scale, v, scale)
        stored = launches.stored_head(q.shape[3])
        parts = []
        scales = [quantizer.scale.reshape(-1) for quantizer in self.quantizers]
        zeros = [quantizer.zero_point.reshape(-1) for quantizer in self.quantizers]
        operands = zip((q, k, v), (operand_scale, operand_scale, 1.0), self.quantizers, scales, zeros, strict=False)
        for x, factor, quantizer, delta, zero in operands:
            common = (delta, zero, self.index.index, quantizer.n_bits, quantizer.symmetric)
            rows = x.transpose(1, 2)[:, :, None]  # [N, heads, 1, T, d]
            parts.append(launches.quantize(rows, *common, NO_PADDING, stored, False, factor=factor)[0][:, 0])
        bits = [quantizer.n_bits for quantizer in self.quantizers]
        signs = [quantizer.symmetric for quantizer in self.quantizers]
        return launches.attention(
            *parts, scales, zeros, self.index.index, bits, signs, q.shape[2], q.shape[3], scale, _result_dtype(q)
        )

    def takes(self, q: Tensor, k: Tensor) -> bool:
        """Whether the kernels take queries [N, T, heads, d] and keys [N, S, heads, d]."""
        quantized = all(quantizer.enabled for quantizer in self.quantizers)
        spans = [_span_limit(quantizer) for quantizer in self.quantizers]
        sums = max(spans[0] * spans[1] * launches.stored_head(q.shape[3]), spans[2] * spans[3] * k.shape[1])
        bytes_stored = max(q[..., 0].numel(), k[..., 0].numel()) * launches.stored_head(q.shape[3])
        fits = q.shape[3] <= launches.MAX_HEAD and sums < 2**31 and bytes_stored < launches.LARGEST
        return quantized and self.index.is_one_group() and fits and q.dtype in launches.DTYPES and q.numel() > 0

    def _simulate(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        first, second, third, last = self.quantizers
        q, k, v = first(q.transpose(1, 2)), second(k.transpose(1, 2)), third(v.transpose(1, 2))
        probabilities = last(torch.softmax(q @ k.transpose(2, 3) * scale, dim=-1))
        return (probabilities @ v).transpose(1, 2)


def _span_limit(quantizer: ActQuantizer) -> int:
    """A bound of |q - zero point| of one byte whose zero point lies in the byte."""
    return 256 if quantizer.n_bits <= 8 or quantizer.is_softmax else 2**16
