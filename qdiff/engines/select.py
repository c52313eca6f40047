"""Choosing an engine: what a quantized network runs on, by its device, its number formats and this machine."""

import itertools
import logging

import torch
from torch import nn

from qdiff.engines import probe
from qdiff.engines.cpu import CpuProxy, to_integer
from qdiff.engines.cuda import Int8Linear, fuse_attention, to_packed
from qdiff.engines.proxy import has_engine
from qdiff.errors import ConfigError
from qdiff.layers import QuantLayer

log = logging.getLogger(__name__)

ENGINES = ("auto", "integer", "simulated")
NARROW = 50_000  # weights of a layer, on average, below which integers are not faster: the time goes to what is between the products


def apply_engine(model: nn.Module, engine: str = "auto") -> nn.Module:
    """The network to sample with: for inference, its results carry no gradients.

    Args:
        model: the network, quantized or not, on its device. On CUDA every engine but `simulated` means packed weights (`gpu`);
            there one that is not quantized is changed in place. One that is prepared already is returned as it is.
        engine: `simulated`: as it is. `integer`: products on integers. `auto`: integers where they are exact and fast, and a
            log line that says what was chosen. A NaN among the inputs of an integer product becomes a number: bytes have none.

    Raises:
        ConfigError: `integer` where it cannot run; an engine that does not exist.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if engine == "simulated" or has_engine(model):
        return model
    tensors = itertools.chain(model.parameters(), model.buffers(), [torch.zeros(0)])
    if (kind := next(tensors).device.type) == "cuda":
        return on_gpu(model, int8_products=engine == "integer")
    if engine == "auto" and not any(isinstance(module, QuantLayer) for module in model.modules()):
        return model
    reason = _reason(model, kind) or (_too_narrow(model) if engine == "auto" else None)
    if reason is None:
        integer = to_integer(model)
        parts = [module.usable for module in integer.modules() if isinstance(module, CpuProxy)]
        reason = None if any(parts) else "no layer has a form that the integer products take"
    if engine == "integer" and reason is not None:
        raise ConfigError(f"--engine integer: {reason}")
    if reason is not None:
        log.info("engine: simulated (%s)", reason)
        return model
    log.info("engine: integer (%d of %d layers and products)", sum(parts), len(parts))
    return integer


def on_gpu(model: nn.Module, int8_products: bool) -> nn.Module:
    """Packed weights and channels_last memory; attentions that are not quantized are fused, in full precision too."""
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        model = to_packed(model, int8_products)
        count = sum(isinstance(module, Int8Linear) for module in model.modules())
        if int8_products and not count:
            raise ConfigError(
                "--engine integer: no linear layer with one 8-bit input scale and widths that are multiples of 8"
            )
        log.info("engine: packed weights, expanded on use%s", f"; {count} linear layers on int8" if count else "")
    elif int8_products:
        raise ConfigError("--engine integer: the network is not quantized")
    return fuse_attention(model).to(memory_format=torch.channels_last)


def _reason(model: nn.Module, device: str) -> str | None:
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    if not layers:
        return "the network is not quantized"
    if not all(q.enabled for layer in layers for q in layer.act_quantizers):
        return "activations are not quantized"
    if device != "cpu":
        return f"integer products are for CPU and CUDA, the network is on {device}"
    if any(q.n_bits > 8 for layer in layers for q in (*layer.weight_quantizers, *layer.act_quantizers)):
        return "more than 8 bits"
    return probe.why_unavailable()


def _too_narrow(model: nn.Module) -> str | None:
    """By the weights alone, so that every process and every restart chooses alike."""
    sizes = [module.shape.numel() for module in model.modules() if isinstance(module, QuantLayer)]
    mean = sum(sizes) // len(sizes)
    return f"{mean} weights a layer: integers are not faster below {NARROW}" if mean < NARROW else None
