"""What a network costs: multiply-accumulates, bit operations, bytes."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qdiff.layers import ActQuantizer, QuantLayer, QuantMatMul

DEFINITION = (
    "MACs: of convolutions, linear layers and both attention products, for one image and one evaluation. BOPs: MACs x bits of the weights "
    "x bits of the activations (32 where they are not quantized; attention products: the bits of both factors). "
    "Size: quantized weights x their bits / 8 + all other parameters x 4 bytes."
)


@dataclass(frozen=True)
class Cost:
    """See `DEFINITION`; size in bytes."""

    macs: int
    bops: int
    size: float


@torch.no_grad()
def measure_cost(wrapped: nn.Module, inputs: tuple[Tensor, ...], weight_bits: int = 0, act_bits: int = 0) -> Cost:
    """The cost of a wrapped network for `inputs` of one image; with `weight_bits` or `act_bits` as if these were its widths."""
    macs = bops = 0

    def bits(quantizer: ActQuantizer) -> int:
        return act_bits or (quantizer.n_bits if quantizer.enabled else 32)

    def layer_hook(layer: QuantLayer, args: tuple, output: Tensor) -> None:
        nonlocal macs, bops
        positions = output.numel() // cast(torch.Size, layer.shape)[0]  # mypy sees Tensor | Module
        for weight, act in zip(layer.weight_quantizers, layer.act_quantizers, strict=True):
            part = positions * weight.integers.numel()
            macs += part
            bops += part * (weight_bits or weight.n_bits) * bits(act)

    def product_hook(product: QuantMatMul, args: tuple, output: Tensor) -> None:
        nonlocal macs, bops
        part = output.numel() * args[0].shape[-1]
        macs += part
        first, second = product.act_quantizers
        bops += part * bits(first) * bits(second)

    handles = [
        module.register_forward_hook(layer_hook if isinstance(module, QuantLayer) else product_hook)
        for module in wrapped.modules()
        if isinstance(module, QuantLayer | QuantMatMul)
    ]
    try:
        wrapped(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    layers = [module for module in wrapped.modules() if isinstance(module, QuantLayer)]
    quantized = sum(
        weight.integers.numel() * (weight_bits or weight.n_bits) / 8
        for layer in layers
        for weight in layer.weight_quantizers
    )
    others = sum(parameter.numel() for parameter in wrapped.parameters()) * 4
    return Cost(macs, bops, quantized + others)
