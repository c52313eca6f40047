"""A quantized network on a GPU: weights stay packed in its memory and are expanded where a product needs them.

The expanded weight lives as long as the product, in the precision of autocast where that is on. Linear layers can also run on
`torch._int_mm` (`--engine integer`). Which of the two is faster depends on card and shape; it is not chosen by timing, because then
two processes could choose differently and images would depend on their number. The integers, step sizes and
formulas are those of the simulation.
"""

import copy

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.checkpoint import pack_integers, unpack_integers
from qdiff.engines.proxy import ModuleProxy
from qdiff.layers import ActQuantizer, MatMul, QuantLayer, QuantLinear, QuantMatMul, WeightQuantizer
from qdiff.model import has_own_behavior, replace_modules


def to_packed(model: nn.Module, int8_products: bool) -> nn.Module:
    """A copy of a quantized network whose weights are packed; biases, norms and step sizes are shared. Layers with hooks stay.

    int8_products: linear layers multiply int8 where their widths and shapes allow it.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    result = copy.deepcopy(model, shared).eval()

    def packed(_: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, QuantLayer) or has_own_behavior(layer):
            return None
        fits = int8_products and Int8Linear.fits(layer)
        return Int8Linear(PackedLayer(layer)) if fits else PackedLayer(layer)

    replace_modules(result, packed)
    return result


def fuse_attention(model: nn.Module) -> nn.Module:
    """Let attentions whose products are not quantized run on PyTorch's fused operator; in place."""
    for module in model.modules():
        if hasattr(type(module), "fused"):
            products = [child for child in module.children() if isinstance(child, MatMul | QuantMatMul)]
            module.fused = not any(
                q.enabled for product in products if isinstance(product, QuantMatMul) for q in product.act_quantizers
            )
    return model


class PackedWeight(nn.Module):
    """Integers of one weight at their true width (4 and 8 bits; others in a byte or more), with their scales."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.n_bits, self.shape = quantizer.n_bits, tuple(quantizer.integers.shape)
        self.dense = quantizer.n_bits in (4, 8)
        self.register_buffer(
            "integers", pack_integers(quantizer.integers, quantizer.n_bits) if self.dense else quantizer.integers
        )
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point)

    def unpack(self) -> Tensor:
        """The integers, one an element."""
        return unpack_integers(self.integers, self.n_bits, self.shape) if self.dense else self.integers

    def expand(self) -> Tensor:
        """The dequantized weight, in the precision of the scales."""
        return (self.unpack().to(self.scale.dtype) - self.zero_point) * self.scale


class PackedLayer(ModuleProxy):
    """A quantized layer that holds its weight packed."""

    proxied = "layer"

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.weights = nn.ModuleList([PackedWeight(quantizer) for quantizer in layer.weight_quantizers])
        self.layer = layer
        layer.drop_weight()

    @property
    def weight(self) -> Tensor:
        return self.layer._join([weight.expand() for weight in self.weights])

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = layer.quantize_input(x)
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            weight = weight.to(torch.get_autocast_dtype(x.device.type))
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return layer.product(x, weight)


class Int8Linear(ModuleProxy):
    """A linear layer on `torch._int_mm`, exact in int32; inputs of 16 rows and less, which CUDA's cannot take, run as the packed layer.

    y = delta_x delta_w (sum (q_x - z_x)(q_w - z_w)) + b, with both zero points taken out by sums over K, in int32.
    """

    MIN_ROWS = 17
    proxied = "floating"

    def __init__(self, packed: PackedLayer) -> None:
        super().__init__()
        self.floating, self.packed = packed, packed.weights[0]
        self.act = packed.layer.act_quantizer
        self.register_buffer("zero", self.packed.zero_point.flatten().to(torch.int32) - 128)
        self.register_buffer("scale", self.packed.scale.flatten())
        self.register_buffer("sums", self._weight().sum(1, dtype=torch.int32))  # [N]

    def _weight(self) -> Tensor:
        """The integers less 128, int8 [N, K]."""
        return (self.packed.unpack() ^ 128).view(torch.int8)

    @staticmethod
    def fits(layer: QuantLayer) -> bool:
        """Whether kind, widths and shape are such that `_int_mm` can be used."""
        if not isinstance(layer, QuantLinear) or layer.split:
            return False
        act, weight = layer.act_quantizer, layer.weight_quantizer
        narrow = act.n_bits <= 8 and weight.n_bits <= 8 and act.enabled and act.groups is None
        return narrow and layer.shape[0] % 8 == 0 and layer.shape[1] % 8 == 0 and Int8Linear._sums_fit(layer)

    @staticmethod
    def _sums_fit(layer: QuantLayer) -> bool:
        """Whether zero points are whole numbers and such that no sum over K leaves int32."""
        zeros = (Int8Linear._act_zero(layer.act_quantizer), layer.weight_quantizer.zero_point)
        if not all(bool((zero == zero.round()).all()) for zero in zeros):
            return False
        # of bytes: the largest |q - z|, which is no less than |z - 128|
        first, second = (127.5 + (zero.double() - 127.5).abs().max().item() for zero in zeros)
        return first * second * layer.shape[1] < 2**31

    @staticmethod
    def _act_zero(act: ActQuantizer) -> Tensor:
        return torch.zeros_like(act.scale) if act.symmetric or act.always_zero else act.zero_point

    def forward(self, x: Tensor) -> Tensor:
        act: ActQuantizer = self.act
        if x.numel() // x.shape[-1] < self.MIN_ROWS:
            return self.floating(x)
        flat = x.reshape(-1, x.shape[-1]).to(act.scale.dtype)
        low, high = Q.integer_range(act.n_bits, act.symmetric)
        zero = self._act_zero(act)
        shift = 0 if act.symmetric else 128
        q = (torch.clamp(torch.round(flat / act.scale) + zero, low, high) - shift).to(torch.int8)
        zero_x = zero.reshape(()).to(torch.int32) - shift
        total = torch._int_mm(q, self._weight().t()) - zero_x * self.sums
        total -= self.zero * (q.sum(1, keepdim=True, dtype=torch.int32) - flat.shape[1] * zero_x)
        y = total.to(act.scale.dtype) * (act.scale * self.scale)
        y = y if self.bias is None else y + self.bias
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return y.to(dtype).unflatten(0, x.shape[:-1])
