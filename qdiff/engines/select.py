"""The choice of an engine for a quantized network, by its device, its number formats and this machine."""

import itertools
import logging

import torch
from torch import nn

from qdiff.engines import probe
from qdiff.engines.cpu import CpuProxy, to_integer
from qdiff.engines.cuda import Int8Linear, fuse_attention, to_packed
from qdiff.engines.proxy import has_engine
from qdiff.errors import ConfigError
from qdiff.layers import QuantLayer, QuantMatMul
from qdiff.model import half_precision

log = logging.getLogger(__name__)

ENGINES = ("auto", "integer", "simulated")
# Mean number of weights per layer below which integers are not faster, because most of the time is spent between the
# layers.
MIN_MEAN_WEIGHTS = 50_000


def apply_engine(model: nn.Module, engine: str = "auto") -> nn.Module:
    """Prepare a network for sampling. The result is for inference; no gradients flow through it.

    Args:
        model: the network, quantized or not, on its device. A network that an engine has prepared is returned as it
            is. On CUDA, every engine but `simulated` packs the weights (`on_gpu`), and a network that is not quantized
            is changed in place.
        engine: `simulated` leaves the network as it is. `integer` multiplies integers. `auto` uses integers where they
            are exact and fast, and logs its choice. An input of an integer product that is NaN becomes a number,
            because 8-bit integers have no NaN.

    Returns:
        The network to sample with.

    Raises:
        ConfigError: `integer` cannot run here, or no engine has this name.
    """
    if engine not in ENGINES:
        raise ConfigError(f" {engine}: expected one of {', '.join(ENGINES)}", field="engine")
    if engine == "simulated" or has_engine(model):
        return model
    tensors = itertools.chain(model.parameters(), model.buffers(), [torch.zeros(0)])
    if (device := next(tensors).device.type) == "cuda":
        return on_gpu(model, int8_products=engine == "integer")
    if engine == "auto" and not any(isinstance(module, QuantLayer) for module in model.modules()):
        return model
    reason = _why_not_integer(model, device) or (_why_not_faster(model) if engine == "auto" else None)
    if reason is None:
        integer = to_integer(model)
        usable = [module.usable for module in integer.modules() if isinstance(module, CpuProxy)]
        if any(usable):
            total = sum(isinstance(module, QuantLayer | QuantMatMul) for module in model.modules())
            log.info("engine: integer (%d of %d layers and attention matmuls)", sum(usable), total)
            return integer
        reason = "no layer has a form that the integer products take"
    if engine == "integer":
        raise ConfigError(f" integer: {reason}", field="engine")
    log.info("engine: simulated (%s)", reason)
    return model


def on_gpu(model: nn.Module, int8_products: bool) -> nn.Module:
    """Prepare a network for CUDA: packed weights, channels_last memory, and fused attentions where none is quantized.

    Args:
        model: the network, quantized or not; attentions of a full-precision network are fused too, in place.
        int8_products: linear layers multiply int8 where their widths and shapes allow it.

    Raises:
        ConfigError: `int8_products`, but no linear layer can.
    """
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        model = to_packed(model, int8_products)
        count = sum(isinstance(module, Int8Linear) for module in model.modules())
        if int8_products and not count:
            raise ConfigError(
                " integer: no linear layer with one 8-bit input scale and widths that are multiples of 8",
                field="engine",
            )
        log.info(
            "engine: packed weights, dequantized on use%s", f"; {count} linear layers multiply int8" if count else ""
        )
    elif int8_products:
        raise ConfigError(" integer: the network is not quantized", field="engine")
    model = fuse_attention(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this overload


def _why_not_integer(model: nn.Module, device: str) -> str | None:
    """The reason why integer products on the CPU cannot run; None if they can."""
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    if not layers:
        return "the network is not quantized"
    if not all(quantizer.enabled for layer in layers for quantizer in layer.act_quantizers):
        return "activations are not quantized"
    if device != "cpu":
        return f"integer products are for CPU and CUDA, the network is on {device}"
    if half := half_precision(model):
        return f"the network is in {str(half).removeprefix('torch.')}"
    widths = (q.n_bits for layer in layers for q in (*layer.weight_quantizers, *layer.act_quantizers))
    if any(n_bits > 8 for n_bits in widths):
        return "more than 8 bits"
    return probe.why_unavailable()


def _why_not_faster(model: nn.Module) -> str | None:
    """The reason why integer products would not be faster; None if they would.

    The choice depends on the weights alone, so that every process and every restart makes the same choice.
    """
    sizes = [module.shape.numel() for module in model.modules() if isinstance(module, QuantLayer)]
    mean = sum(sizes) // len(sizes)
    if mean >= MIN_MEAN_WEIGHTS:
        return None
    return f"{mean} weights a layer: integers are not faster below {MIN_MEAN_WEIGHTS}"
