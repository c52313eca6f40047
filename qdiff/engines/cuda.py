"""A quantized network on a GPU: weights stay packed in its memory and are dequantized on use.

Weights are dequantized right before each convolution or matmul, in the precision of autocast if that is on, and freed
afterwards. Integers, scales, smoothing and formulas are those of the simulation. The engine in `qdiff.engines.gpu`
multiplies integers instead.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.checkpoint import pack_integers, unpack_integers
from qdiff.engines.proxy import ModuleProxy, plain
from qdiff.layers import (
    LAYER_TYPES,
    AttentionCore,
    MatMul,
    QuantLayer,
    QuantMatMul,
    WeightQuantizer,
    dequantize,
    fused_attention,
)
from qdiff.model import has_own_behavior, replace_modules


def to_packed(model: nn.Module) -> nn.Module:
    """Copy a quantized network and pack the weights of the copy.

    Args:
        model: the quantized network.

    Returns:
        A copy that shares biases, norms and scales with `model`. Layers with hooks are not replaced.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    result = copy.deepcopy(model, shared).eval()

    def replacement(_: str, layer: nn.Module) -> nn.Module | None:
        return PackedLayer(layer) if isinstance(layer, QuantLayer) and not has_own_behavior(layer) else None

    replace_modules(result, replacement)
    return result


def fuse_attention(model: nn.Module) -> nn.Module:
    """Let attentions whose matmuls are not quantized run on PyTorch's fused operator, in place; returns `model`."""
    for _, module, matmuls in attentions(model):
        quantized = any(
            quantizer.enabled
            for matmul in matmuls
            if isinstance(matmul, QuantMatMul)
            for quantizer in matmul.act_quantizers
        )
        if not quantized:
            set_core(module, fused_attention)
    return model


def set_core(module: nn.Module, core: AttentionCore) -> None:
    """Let `core` compute an attention."""
    setattr(module, "core", core)  # noqa: B010  # mypy knows no attribute `core` of nn.Module


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """The attention modules that can leave their computation to an engine: path, module and its two matmuls.

    Those are modules with an attribute `core`; the matmul of queries and keys comes first.
    """
    for path, module in model.named_modules():
        if hasattr(type(module), "core"):
            yield path, module, [child for child in module.children() if isinstance(child, MatMul | QuantMatMul)]


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
        x = layer.quantize_input(plain(x))
        autocast = torch.is_autocast_enabled(x.device.type)
        weight = self.weight.to(torch.get_autocast_dtype(x.device.type) if autocast else layer.dtype)
        # on a GPU always, because the memory of a kernel of one pixel does not show its format
        if x.dim() == 4 and (x.is_cuda or x.is_contiguous(memory_format=torch.channels_last)):
            x, weight = (part.contiguous(memory_format=torch.channels_last) for part in (x, weight))
        return layer.apply_weight(x, weight, *args, **kwargs)
