"""A quantized network on a GPU: weights stay packed in its memory and are dequantized on use.

Weights are dequantized right before each convolution or matmul, in the precision of autocast if that is on, and freed
afterwards. With the engine `integer`, linear layers multiply int8 by `torch._int_mm` instead. Which of the two is
faster depends on card and shape. It is not chosen by timing, because two processes could then choose differently, and
images would depend on the number of processes. Integers, scales, smoothing and formulas are those of the simulation.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.checkpoint import pack_integers, unpack_integers
from qdiff.engines.proxy import ModuleProxy
from qdiff.layers import (
    LAYER_TYPES,
    ActQuantizer,
    MatMul,
    QuantLayer,
    QuantLinear,
    QuantMatMul,
    WeightQuantizer,
    dequantize,
    fused_attention,
)
from qdiff.model import has_own_behavior, replace_modules


def to_packed(model: nn.Module, int8_products: bool) -> nn.Module:
    """Copy a quantized network and pack the weights of the copy.

    Args:
        model: the quantized network.
        int8_products: linear layers multiply int8 where their widths and shapes allow it.

    Returns:
        A copy that shares biases, norms and scales with `model`. Layers with hooks are not replaced.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    result = copy.deepcopy(model, shared).eval()

    def replacement(_: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, QuantLayer) or has_own_behavior(layer):
            return None
        fits = int8_products and Int8Linear.obstacle(layer) is None
        return Int8Linear(PackedLayer(layer)) if fits else PackedLayer(layer)

    replace_modules(result, replacement)
    return result


def find_obstacles(network: nn.Module) -> dict[str, str | None]:
    """Why linear layers do not multiply int8, by path; None: they do.

    Args:
        network: a network that `to_packed` has prepared.
    """
    layers = {path: module.layer for path, module in network.named_modules() if isinstance(module, PackedLayer)}
    return {path: Int8Linear.obstacle(layer) for path, layer in layers.items() if isinstance(layer, QuantLinear)}


def fuse_attention(model: nn.Module) -> nn.Module:
    """Let attentions whose matmuls are not quantized run on PyTorch's fused operator, in place; returns `model`."""
    for module, matmuls in attentions(model):
        quantized = any(
            quantizer.enabled
            for matmul in matmuls
            if isinstance(matmul, QuantMatMul)
            for quantizer in matmul.act_quantizers
        )
        if not quantized:
            module.core = fused_attention
    return model


def attentions(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The attention modules that can leave their computation to an engine, and the two matmuls of each.

    Those are modules with an attribute `core`; the matmul of queries and keys comes first.
    """
    for module in model.modules():
        if hasattr(type(module), "core"):
            yield module, [child for child in module.children() if isinstance(child, MatMul | QuantMatMul)]


def halve_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of full-precision layers in the type that autocast would turn them into in every forward pass.

    The numbers are the same. Normalizations stay float32, as autocast computes them.

    Args:
        model: the network; changed in place.
        dtype: the type of autocast.
    """
    for module in model.modules():
        if type(module) in LAYER_TYPES:
            module.to(dtype)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """A GroupNorm that keeps channels_last memory, which CUDA's loses. An existing one becomes it by its class."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last) if last else y


def keep_channels_last(model: nn.Module) -> nn.Module:
    """Let a network compute in channels_last memory from its first convolution on, in place; returns `model`."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ChannelsLastGroupNorm
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this overload


class PackedWeight(nn.Module):
    """The integers of one weight at their true width, with scales and zero points.

    4-bit and 8-bit integers take 4 and 8 bits each; other widths take the type of the quantizer's integers.

    Args:
        quantizer: the weight quantizer.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.n_bits, self.shape = quantizer.n_bits, tuple(quantizer.integers.shape)
        self.dense = quantizer.n_bits in (4, 8)
        integers = pack_integers(quantizer.integers, quantizer.n_bits) if self.dense else quantizer.integers
        self.register_buffer("integers", integers)
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point)

    def unpack(self) -> Tensor:
        """The integers in the weight's shape, one in each element."""
        return unpack_integers(self.integers, self.n_bits, self.shape) if self.dense else self.integers

    def dequantize(self) -> Tensor:
        """The weight in the precision of the scales."""
        return dequantize(self.unpack(), self.scale, self.zero_point)


class PackedLayer(ModuleProxy):
    """A quantized layer with a packed weight.

    Args:
        layer: the layer; its own integers are freed.
    """

    layer: QuantLayer
    proxied = "layer"

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.weights = nn.ModuleList([PackedWeight(quantizer) for quantizer in layer.weight_quantizers])
        self.layer = layer
        layer.drop_weight()

    @property
    def packed_weights(self) -> list[PackedWeight]:
        """The packed weight of the layer, or of both halves of a split layer."""
        return [weight for weight in self.weights if isinstance(weight, PackedWeight)]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight."""
        return self.layer._join([weight.dequantize() for weight in self.packed_weights])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        x = layer.quantize_input(x)
        autocast = torch.is_autocast_enabled(x.device.type)
        weight = self.weight.to(torch.get_autocast_dtype(x.device.type) if autocast else layer.dtype)
        # on a GPU always, because the memory of a kernel of one pixel does not show its format
        if x.dim() == 4 and (x.is_cuda or x.is_contiguous(memory_format=torch.channels_last)):
            x, weight = (part.contiguous(memory_format=torch.channels_last) for part in (x, weight))
        return layer.apply_weight(x, weight, *args, **kwargs)


class Int8Linear(ModuleProxy):
    """A linear layer on `torch._int_mm`, whose sums are exact in int32.

    y = scale_x scale_w (sum (q_x - z_x)(q_w - z_w)) + b, where both zero points are corrected by sums over K, in int32.
    Inputs of at most 16 rows, which `_int_mm` cannot take on CUDA, run as the packed layer.

    Args:
        packed: the packed layer; `obstacle` must find none for its layer.
    """

    MIN_ROWS = 17
    act: ActQuantizer
    floating: PackedLayer
    packed: PackedWeight
    zero: Tensor
    scale: Tensor
    sums: Tensor
    proxied = "floating"

    def __init__(self, packed: PackedLayer) -> None:
        super().__init__()
        (weight,) = packed.packed_weights
        self.floating, self.packed, self.act = packed, weight, packed.layer.act_quantizer
        self.register_buffer("zero", weight.zero_point.flatten().to(torch.int32) - 128)
        self.register_buffer("scale", weight.scale.flatten())
        self.register_buffer("sums", self._weight().sum(1, dtype=torch.int32))  # [N]

    def _weight(self) -> Tensor:
        """The integers less 128, int8 [N, K]."""
        return (self.packed.unpack() ^ 128).view(torch.int8)

    @staticmethod
    def obstacle(layer: QuantLayer) -> str | None:
        """Why the kind, the widths or the shape of a layer do not allow `_int_mm`; None: they do."""
        if not isinstance(layer, QuantLinear) or layer.split:
            return "no linear layer with one input"
        act, weight = layer.act_quantizer, layer.weight_quantizer
        if act.n_bits > 8 or weight.n_bits > 8:
            return "more than 8 bits"
        if not act.enabled or act.groups is not None:
            return "not one scale of the input"
        if layer.shape[0] % 8 or layer.shape[1] % 8:
            return "sides that are no multiples of 8"
        return None if Int8Linear._sums_fit(layer) else "sums beyond 32 bits, or fractional zero points"

    @staticmethod
    def _sums_fit(layer: QuantLayer) -> bool:
        """Whether zero points are whole numbers and no sum over K leaves int32."""
        zeros = (Int8Linear._act_zero(layer.act_quantizer), layer.weight_quantizer.zero_point)
        if not all(bool((zero == zero.round()).all()) for zero in zeros):
            return False
        # the largest |q - z| of bytes q, which is no less than |z - 128|
        first, second = (127.5 + (zero.double() - 127.5).abs().max().item() for zero in zeros)
        return first * second * layer.shape[1] < 2**31

    @staticmethod
    def _act_zero(act: ActQuantizer) -> Tensor:
        return torch.zeros_like(act.scale) if act.zero_is_fixed else act.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] < self.MIN_ROWS:
            return self.floating(x)
        act = self.act
        flat = x.reshape(-1, x.shape[-1]).to(act.scale.dtype)
        flat = flat if self.smoothing is None else flat / self.smoothing
        zero = self._act_zero(act)
        shift = 0 if act.symmetric else 128
        q = (Q.quantize_nearest(flat, act.scale, zero, act.n_bits, act.symmetric) - shift).to(torch.int8)
        zero_x = zero.reshape(()).to(torch.int32) - shift
        total = torch._int_mm(q, self._weight().t()) - zero_x * self.sums
        total -= self.zero * (q.sum(1, keepdim=True, dtype=torch.int32) - flat.shape[1] * zero_x)
        y = total.to(act.scale.dtype) * (act.scale * self.scale)
        y = y if self.bias is None else y + self.bias
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return y.to(dtype).unflatten(0, x.shape[:-1])
