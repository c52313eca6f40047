"""The cost of a network: multiply-accumulates, bit operations, and bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qdiff.layers import ActQuantizer, QuantLayer, QuantMatMul, multiply_accumulates

DEFINITION = (
    "MACs count convolutions, linear layers and attention matmuls, quantized or not, for one image and one evaluation "
    "of the network. BOPs are MACs x bits of the weights x bits of the activations (32 if they are not quantized); for "
    "attention matmuls they are MACs x the bits of both operands. What stays in full precision counts with 32 x 32. "
    "The size is quantized weights x their bits / 8 + all other parameters and smoothing factors x 4 bytes."
)


@dataclass(frozen=True)
class Cost:
    """The cost of one evaluation of a network for one image, see `DEFINITION`.

    Attributes:
        macs: multiply-accumulates.
        bops: bit operations.
        size: bytes.
    """

    macs: int
    bops: int
    size: float


@torch.no_grad()
def measure_cost(wrapped: nn.Module, inputs: tuple[Tensor, ...], weight_bits: int = 0, act_bits: int = 0) -> Cost:
    """Measure the cost of a wrapped network in one forward pass.

    Args:
        wrapped: the network with quantized layers.
        inputs: its inputs for one image.
        weight_bits: count the weights of quantized layers as if they had this width; 0: their own.
        act_bits: count quantized activations as if they had this width; 0: their own.
    """
    macs = bops = 0  # of quantized layers and attention matmuls

    def bits(quantizer: ActQuantizer) -> int:
        return act_bits or (quantizer.n_bits if quantizer.enabled else 32)

    def layer_hook(layer: QuantLayer, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, bops
        whole = multiply_accumulates(layer, args[0], output)
        macs += whole
        for weight, act in zip(layer.weight_quantizers, layer.act_quantizers, strict=True):
            part = whole * weight.integers.numel() // layer.shape.numel()
            bops += part * (weight_bits or weight.n_bits) * bits(act)

    def matmul_hook(matmul: QuantMatMul, args: tuple, output: Tensor) -> None:
        nonlocal macs, bops
        part = multiply_accumulates(matmul, args[0], output)
        macs += part
        first, second = matmul.act_quantizers
        bops += part * bits(first) * bits(second)

    handles = [
        module.register_forward_hook(layer_hook if isinstance(module, QuantLayer) else matmul_hook)
        for module in wrapped.modules()
        if isinstance(module, QuantLayer | QuantMatMul)
    ]
    try:
        total = _total_macs(wrapped, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Cost(total, bops + (total - macs) * 32 * 32, _size(wrapped, weight_bits))


def _total_macs(network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """The multiply-accumulates of all convolutions and matmuls of a forward pass."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # operations inside fused ones are not counted everywhere
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def _size(network: nn.Module, weight_bits: int) -> float:
    layers = [module for module in network.modules() if isinstance(module, QuantLayer)]
    quantized = sum(
        weight.integers.numel() * (weight_bits or weight.n_bits) / 8
        for layer in layers
        for weight in layer.weight_quantizers
    )
    smoothing = sum(layer.smoothing.numel() for layer in layers if layer.smoothing is not None)
    return quantized + (sum(parameter.numel() for parameter in network.parameters()) + smoothing) * 4
