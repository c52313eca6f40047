"""The choice of an engine for a quantized network, by its device, its number formats and this machine."""

import itertools
import logging
from collections.abc import Mapping

import torch
from torch import nn

from qdiff.engines import cpu, cuda, probe, speed
from qdiff.engines.gpu import card
from qdiff.engines.proxy import has_engine
from qdiff.errors import ConfigError
from qdiff.layers import QuantLayer
from qdiff.model import half_precision, quant_layers

log = logging.getLogger(__name__)

INTEGER_ENGINES = ("integer", "integer_packed")  # an error where they cannot run
ENGINES = ("auto", *INTEGER_ENGINES, "simulated")
MIN_SHARE = 0.5  # of the weights that `auto` wants in layers that multiply int8 on CUDA
MAX_NAMES = 8  # of layers in a log line, for each reason


def apply_engine(model: nn.Module, engine: str = "auto") -> nn.Module:
    """Prepare a network for sampling. The result is for inference; no gradients flow through it.

    Args:
        model: the network, quantized or not, on its device. A network that an engine has prepared is returned as it
            is. On CUDA, every engine but `simulated` prepares it for the card (`on_gpu`), and a network that is not
            quantized is changed in place.
        engine: `simulated` leaves the network as it is. `integer` multiplies integers. `integer_packed` does so on
            CUDA with weights of up to 4 bits packed in memory. `auto` uses integers where they are exact and fast, and
            logs its choice. An input of an integer product that is NaN becomes a number, because 8-bit integers have
            no NaN.

    Returns:
        The network to sample with.

    Raises:
        ConfigError: `integer` or `integer_packed` cannot run here, or no engine has this name.
    """
    tensors = itertools.chain(model.parameters(), model.buffers(), [torch.zeros(0)])
    place = next(tensors).device
    validate_engine(engine, place)
    if engine == "simulated" or has_engine(model):
        return model
    if place.type == "cuda":
        return on_gpu(model, engine, place)
    device = place.type
    if engine == "auto" and not any(isinstance(module, QuantLayer) for module in model.modules()):
        return model
    reason = _why_not_integer(model, device)
    if reason is None:
        depth = speed.row().min_depth if engine == "auto" else 0
        network = cpu.to_integer(model, depth)
        obstacles = cpu.find_obstacles(network)
        reason = _why_useless(model, obstacles, faster=engine == "auto")
        if reason is None:
            count = sum(obstacle is None for obstacle in obstacles.values())
            attends = any(isinstance(m, cpu.IntegerMatMul) and m.obstacle is None for m in network.modules())
            flat = f"; attention matmuls of a depth below {depth}: simulated, which is faster"
            log.info(
                "engine: integer (%d of %d layers and attention matmuls) for %s%s%s",
                count,
                len(obstacles),
                speed.origin(),
                _describe(obstacles),
                flat if depth and attends else "",
            )
            return network
    if engine == "integer":
        raise ConfigError(f" integer: {reason}", field="engine")
    log.info("engine: simulated (%s)", reason)
    return model


def validate_engine(engine: str, device: torch.device) -> None:
    """Check what can be known of an engine before there is a network.

    Raises:
        ConfigError: no engine has this name, or it is for another device.
    """
    if engine not in ENGINES:
        raise ConfigError(f" {engine}: expected one of {', '.join(ENGINES)}", field="engine")
    if engine == "integer_packed" and device.type != "cuda":
        raise ConfigError(f" integer_packed: it is for CUDA, found {device.type}", field="engine")


def on_gpu(model: nn.Module, engine: str, device: torch.device) -> nn.Module:
    """Prepare a network for CUDA: it multiplies integers, or its weights are packed.

    Attentions that are not quantized run on PyTorch's fused operator, and memory is channels_last.

    Args:
        model: the network, quantized or not; attentions of a full-precision network are fused too, in place.
        engine: `integer`, `integer_packed`, or `auto`, which takes integers where they are expected to be faster and a
            check on the card has passed.
        device: the card.

    Raises:
        ConfigError: the engine is not `auto`, but the card cannot run it, or no layer of the network can.
    """
    if not any(isinstance(module, QuantLayer) for module in model.modules()):
        if engine != "auto":
            raise ConfigError(f" {engine}: the network is not quantized", field="engine")
        return cuda.keep_channels_last(cuda.fuse_attention(model))
    faster = engine == "auto"
    reason = card.why_unavailable(device)
    if reason is None and faster and not card.expected_faster(device):
        reason = f"int8 is not expected to be faster on {torch.cuda.get_device_name(device)}"
    if reason is None:
        from qdiff.engines.gpu import layers  # needs triton

        obstacles = layers.find_obstacles(model)
        reason = _why_useless_on_gpu(model, obstacles, faster) or card.why_wrong(device)
        if reason is None:
            return cuda.keep_channels_last(
                cuda.fuse_attention(_int8(model, device, obstacles, engine == "integer_packed"))
            )
    if not faster:
        raise ConfigError(f" {engine}: {reason}", field="engine")
    log.info("engine: packed weights, dequantized on use (%s)", reason)
    return cuda.keep_channels_last(cuda.fuse_attention(cuda.to_packed(model)))


def _why_useless_on_gpu(model: nn.Module, obstacles: Mapping[str, str | None], faster: bool) -> str | None:
    """Why integers are of no use for a network on a card; None: they are of use.

    Args:
        model: the simulated network.
        obstacles: of its layers and attentions.
        faster: whether integers must be expected to be faster.
    """
    if all(obstacles.values()):
        return f"no layer has a form that the integer products take{_describe(obstacles)}"
    layers = quant_layers(model)
    # those whose inputs have two bytes take two products and count half
    integer = sum(layer.shape.numel() // _products(layer) for path, layer in layers.items() if not obstacles[path])
    share = integer / sum(layer.shape.numel() for layer in layers.values())
    if faster and share < MIN_SHARE:
        return f"only {share:.0%} of the weights are in layers that int8 makes faster{_describe(obstacles)}"
    return None


def _int8(model: nn.Module, device: torch.device, obstacles: Mapping[str, str | None], packed: bool) -> nn.Module:
    """A copy of a quantized network that multiplies integers on a card; the log says which layers do not."""
    from qdiff.engines.gpu import graphs, layers  # needs triton

    network = layers.to_integer(model, obstacles, packed)
    count = sum(obstacle is None for obstacle in obstacles.values())
    log.info(
        "engine: integer (%d of %d layers and attentions) for %s%s%s",
        count,
        len(obstacles),
        card.origin(device),
        f"; weights of {layers.count_packed(network)} layers stay packed" if packed else "",
        _describe(obstacles, "in floating point"),
    )
    return graphs.GraphedNetwork(network)


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
    return probe.why_unavailable()


def _why_useless(model: nn.Module, obstacles: Mapping[str, str | None], faster: bool) -> str | None:
    """The reason why integer products are of no use; None if they are of use.

    The choice depends on formats and weights alone, so that every process and every restart makes the same choice.

    Args:
        model: the simulated network.
        obstacles: see `find_obstacles`.
        faster: whether integer products must be faster.
    """
    paths = [path for path, obstacle in obstacles.items() if obstacle is None]
    if not paths:
        return f"no layer has a form that the integer products take{_describe(obstacles)}"
    layers = quant_layers(model)
    sizes = [layer.shape.numel() // _products(layer) for layer in map(layers.get, paths) if layer is not None]
    mean = sum(sizes) // max(len(sizes), 1)
    if not faster or mean >= speed.MIN_WEIGHTS:
        return None
    below = f"integers are not faster below {speed.MIN_WEIGHTS}"
    return f"{mean} weights a layer: {below}{_describe(obstacles)}"


def _products(layer: QuantLayer) -> int:
    """How many integer products a layer takes: two if its inputs have two bytes."""
    return 2 if any(quantizer.n_bits > 8 for quantizer in layer.act_quantizers) else 1


def _describe(obstacles: Mapping[str, str | None], what: str = "simulated") -> str:
    """The layers that do not run on integers, by reason: the end of a log line. `what` says what is done instead."""
    paths: dict[str, list[str]] = {}
    for path, obstacle in obstacles.items():
        if obstacle is not None:
            paths.setdefault(obstacle, []).append(path or "the network")
    return "".join(f"; {what}: {_listed(names)} ({obstacle})" for obstacle, names in paths.items())


def _listed(names: list[str]) -> str:
    """The first names of a list, and how many there are more."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
