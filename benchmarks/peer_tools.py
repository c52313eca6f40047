"""The settings of other quantization tools that `peers` measures: SDNQ, optimum-quanto and torchao."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """A setting of another tool.

    Attributes:
        name: as the table shows it.
        module: the module that must be installed.
        activations: whether it quantizes activations too.
        quantize: quantizes a network in place, or returns another one. It gets the network and calibration samples.
    """

    name: str
    module: str
    activations: bool
    quantize: Callable[[nn.Module, Inputs], nn.Module]


def sdnq(network: nn.Module, _: Inputs, **settings: Any) -> nn.Module:
    """SDNQ, convolutions too."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # compiling takes minutes and changes no figure
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(network, quant_conv=True, **settings)


def quanto(network: nn.Module, samples: Inputs, weights: str, activations: str | None) -> nn.Module:
    """optimum-quanto; ranges of activations come from 16 of the samples."""
    from optimum.quanto import Calibration, freeze, quantize

    quantize(network, weights=weights, activations=activations)
    if activations is not None:
        chosen = torch.linspace(0, len(samples[0]) - 1, 16).long()
        with torch.no_grad(), Calibration():
            network(*(part[chosen] for part in samples))
    freeze(network)
    return network


def torchao_weights(network: nn.Module, _: Inputs, dtype: str) -> nn.Module:
    """torchao, weights of every layer, one scale for each output channel. Its 4-bit integers are stored as int8."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, dtype))
    quantize_(network, config, filter_fn=lambda module, _: isinstance(module, nn.Conv2d | nn.Linear))
    return network


def torchao_dynamic(network: nn.Module, _: Inputs) -> nn.Module:
    """torchao with activation ranges found at run time, of linear layers only: it has no such convolutions."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(network, Int8DynamicActivationInt8WeightConfig())
    return network


EVERY_LAYER = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}
PER_CHANNEL = {"group_size": -1}
MATMUL = {"use_quantized_matmul": True, "use_quantized_matmul_conv": True}


def _sdnq(name: str, dtype: str, activations: bool = False, **settings: Any) -> Peer:
    return Peer(f"SDNQ {name}", "sdnq", activations, partial(sdnq, weights_dtype=dtype, **settings))


def _quanto(name: str, weights: str, activations: str | None = None) -> Peer:
    quantize = partial(quanto, weights=weights, activations=activations)
    return Peer(f"quanto {name}", "optimum.quanto", activations is not None, quantize)


PEERS = (
    _sdnq("int8, small layers in float", "int8"),
    _sdnq("int8", "int8", **EVERY_LAYER),
    _sdnq("uint4 groups, small layers in float", "uint4"),
    _sdnq("uint4 groups", "uint4", **EVERY_LAYER),
    _sdnq("uint4, small layers in float", "uint4", **PER_CHANNEL),
    _sdnq("uint4", "uint4", **PER_CHANNEL, **EVERY_LAYER),
    _quanto("int8", "qint8"),
    _quanto("int4", "qint4"),
    Peer("torchao int8", "torchao", False, partial(torchao_weights, dtype="int8")),
    Peer("torchao int4 stored as int8", "torchao", False, partial(torchao_weights, dtype="int4")),
    _sdnq("int8 matmul, small layers in float", "int8", activations=True, **MATMUL),
    _sdnq("int8 matmul", "int8", activations=True, **MATMUL, **EVERY_LAYER),
    _quanto("int8, int8", "qint8", "qint8"),
    Peer("torchao int8 linear layers, dynamic int8", "torchao", True, torchao_dynamic),
)


def is_installed(module: str) -> bool:
    """Whether a module, or a module of a package, can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def tensor_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor; those of its parts if it is a subclass that is made of others."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def state_bytes(network: nn.Module) -> int:
    """The bytes of all tensors of a network's state."""
    return sum(tensor_bytes(value) for value in network.state_dict().values() if isinstance(value, Tensor))
