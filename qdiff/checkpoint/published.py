"""The published format: `torch.save` of the quantized network's state, prefix `model.`, weights in full precision
with alphas.

Bit widths are not stored; they are inferred where possible and compared with the settings given.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.architecture import Architecture
from qdiff.checkpoint.reading import (
    assign_parameters,
    check_finite,
    check_keys,
    has_acts,
    has_split,
    look_of,
    read_tensors,
)
from qdiff.config import QuantConfig
from qdiff.errors import CheckpointError
from qdiff.model import act_quantizers, enable_activations, find_timestep_groups, quant_layers, quantize_model
from qdiff.utils.files import atomic_write

log = logging.getLogger(__name__)

PREFIX = "model."


def published_names(model: nn.Module, architecture: Architecture) -> dict[str, str]:
    """From the path of each quantizer of an attention matmul here to its name in a published file."""
    names = {}
    for path, module in model.named_modules():
        for attribute, spec in architecture.attention_matmuls.get(type(module), {}).items():
            for operand in spec.operands:
                inner = f"{path}.{attribute}.act_quantizer_{operand}"
                names[inner] = f"{path}.act_quantizer_{operand}" if spec.on_block else inner
    return names


def published_shapes(model: nn.Module, architecture: Architecture, activations: bool = True) -> dict[str, torch.Size]:
    """Every key of the published file of a quantized network, with its shape.

    Args:
        model: the quantized network.
        architecture: its architecture.
        activations: the file holds activation scales too.
    """
    shapes: dict[str, torch.Size] = {name: p.shape for name, p in model.named_parameters()}
    for path, layer in quant_layers(model).items():
        shapes[f"{path}.weight"] = layer.shape
        for name, quantizer in layer.named_weight_quantizers():
            stem = f"{path}.{name}"
            shapes[f"{stem}.alpha"] = quantizer.integers.shape
            shapes[f"{stem}.delta"] = shapes[f"{stem}.zero_point"] = quantizer.scale.shape
    if activations:
        renamed = published_names(model, architecture)
        for path in act_quantizers(model):
            stem = renamed.get(path, path)
            shapes[f"{stem}.delta"] = shapes[f"{stem}.zero_point"] = torch.Size([])
    return {PREFIX + name: shape for name, shape in shapes.items()}


def save_published(
    path: str | Path, model: nn.Module, architecture: Architecture, weights: Mapping[str, Tensor], activations: bool
) -> None:
    """Write the published format.

    Args:
        path: the file to write.
        model: the quantized network.
        architecture: its architecture.
        weights: the full-precision state dict of the network, because the file stores weights with alphas.
        activations: write the activation scales too.

    Raises:
        CheckpointError: the network has timestep groups, which this format cannot hold, or the weights are those of
            another network.
    """
    if find_timestep_groups(model) is not None:
        raise CheckpointError(f"{path}: the published format holds one scale for all time steps, not timestep groups")
    state: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    for layer_path, layer in quant_layers(model).items():
        weight = weights[f"{layer_path}.weight"].detach().float().cpu()
        state[f"{layer_path}.weight"] = weight
        for (name, quantizer), part in zip(layer.named_weight_quantizers(), layer._parts(weight), strict=True):
            stem = f"{layer_path}.{name}"
            scale, zero = quantizer.scale.cpu(), quantizer.zero_point.cpu()
            integers = quantizer.integers.cpu().float()
            alpha = Q.alpha_from_integers(part, integers, scale, zero)
            if not torch.equal(Q.hard_integers(part, alpha, scale, zero, quantizer.n_bits), integers):
                raise CheckpointError(
                    f"{path}: {layer_path}: its integers are not a rounding of the full-precision weights given"
                )
            state[f"{stem}.alpha"] = alpha
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = scale, zero
    if activations:
        renamed = published_names(model, architecture)
        for name, act_quantizer in act_quantizers(model).items():
            stem = renamed.get(name, name)
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = act_quantizer.scale, act_quantizer.zero_point
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a path would leave its name inside
        torch.save({PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}, file)


def midpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for lost full-precision weights: the middle of each rounding interval."""
    weights = {}
    for name, layer in quant_layers(model).items():
        parts = [(q.integers.float() - q.zero_point + 0.5) * q.scale for q in layer.weight_quantizers]
        weights[f"{name}.weight"] = torch.cat(parts, dim=1)
    return weights


def load_published(
    path: str | Path, unet_config: Mapping[str, Any], architecture: Architecture, config: QuantConfig
) -> nn.Module:
    """A quantized network from a published file: without a forward pass, random data or a second copy of the weights.

    Args:
        path: the file.
        unet_config: the network's configuration, for `architecture.make_unet`.
        architecture: its architecture.
        config: the number formats given; they are compared with what the file shows of itself.

    Raises:
        CheckpointError: another network, split or not, other widths or symmetry, or damaged.
    """
    state = read_tensors(path)
    _check_split(path, state, config)
    activations = has_acts(state)
    if config.quant_act and not activations:
        message = " was given, but the file holds no activation step sizes (weights only)"
        raise CheckpointError(message, field="quant_act", where=f"{path}: ")
    with torch.device("meta"):
        model = quantize_model(architecture.make_unet(dict(unet_config)), architecture, config)
    check_keys(published_shapes(model, architecture, activations), state, path)
    check_finite(path, state)
    _check_steps(path, state)
    _check_weight_bits(path, model, state, config.weight_bit)
    if config.quant_act:
        _check_activations(path, architecture, state, config)
    _fill_published(model, architecture, state, activations)
    enable_activations(model, config.quant_act)
    return model


def _fill_published(
    model: nn.Module, architecture: Architecture, state: Mapping[str, Tensor], activations: bool
) -> None:
    parameters = {name: state[PREFIX + name].float().clone() for name, _ in model.named_parameters()}
    assign_parameters(model, parameters)
    for path, layer in quant_layers(model).items():
        integers = []
        weight = state[f"{PREFIX}{path}.weight"].float()
        for (name, quantizer), part in zip(layer.named_weight_quantizers(), layer._parts(weight), strict=True):
            stem = f"{PREFIX}{path}.{name}"
            scale, zero = state[f"{stem}.delta"].float().clone(), state[f"{stem}.zero_point"].float().clone()
            quantizer.scale, quantizer.zero_point = scale, zero
            integers.append(Q.hard_integers(part, state[f"{stem}.alpha"].float(), scale, zero, quantizer.n_bits))
        layer.set_integers(integers)
    renamed = published_names(model, architecture)
    for path, act_quantizer in act_quantizers(model).items():
        stem = PREFIX + renamed.get(path, path)
        act_quantizer.scale = state[f"{stem}.delta"].float().clone() if activations else torch.tensor(float("nan"))
        act_quantizer.zero_point = state[f"{stem}.zero_point"].float().clone() if activations else torch.tensor(0.0)


def _check_split(path: str | Path, state: Mapping[str, Tensor], config: QuantConfig) -> None:
    if has_split(state) != config.split and any(".weight_quantizer." in key for key in state):
        given, file = ("with", "without") if config.split else ("without", "with")
        message = f" mismatch: called {given} it, but the file was made {file} it; {look_of(state)}"
        raise CheckpointError(message, field="split", where=f"{path}: ")


def _check_steps(path: str | Path, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if name.endswith(".delta") and (tensor == 0).any():
            raise CheckpointError(f"{path}: damaged: {name} holds a step size of zero")


def infer_weight_bits(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The width whose grid the scales were made for; None if they do not show it.

    Per channel (max w - min w) / scale is (2^b - 1) / f with a shrink factor f in [0.21, 1] that is near 1 for some
    channel of most tensors; the least ratio of each tensor votes.
    """
    votes: list[int] = []
    for path, layer in quant_layers(model).items():
        weight = state[f"{PREFIX}{path}.weight"].float()
        for (name, _), part in zip(layer.named_weight_quantizers(), layer._parts(weight), strict=True):
            rows, scale = part.flatten(1), state[f"{PREFIX}{path}.{name}.delta"].flatten()
            ratio = ((rows.amax(1) - rows.amin(1)) / scale)[scale > 10 * Q.MIN_SCALE]
            if len(ratio) == 0 or ratio.min() <= 0:
                continue
            n_bits = round(torch.log2(ratio.min() + 1).item())
            # the shrink that gives this ratio must be one that the search can choose, and not a rare one
            if 0.98 <= ratio.min().item() / (2**n_bits - 1) <= 1.4:
                votes.append(n_bits)
    total = sum(len(layer.weight_quantizers) for layer in quant_layers(model).values())
    if not votes:
        return None
    winner = max(set(votes), key=votes.count)
    return winner if votes.count(winner) > 0.8 * total else None


def _check_weight_bits(path: str | Path, model: nn.Module, state: Mapping[str, Tensor], weight_bit: int) -> None:
    found = infer_weight_bits(model, state)
    if found is None:
        log.warning("%s: it does not show the width of its weights: %d bits are taken as given", path, weight_bit)
    elif found != weight_bit:
        message = f" {weight_bit} was given, but the step sizes of the file are those of {found}-bit weights"
        raise CheckpointError(message, field="weight_bit", where=f"{path}: ")


def infer_act_bits(architecture: Architecture, state: Mapping[str, Tensor]) -> int | None:
    """The width of asymmetric activations; None if nothing in the file shows it.

    x_t and the q and k of attention are symmetric about 0, so their zero points lie near 2^(b - 1), and b is the
    width nearest to their median. Symmetric activations have zero points of 0 at every width.
    """
    names = {f".{architecture.input_layer}.act_quantizer.zero_point"} if architecture.input_layer else set()
    for specs in architecture.attention_matmuls.values():
        for spec in specs.values():
            names |= {f".act_quantizer_{operand}.zero_point" for operand in spec.operands if operand in ("q", "k")}
    zeros = [float(tensor) for name, tensor in state.items() if name.endswith(tuple(names))]
    if not zeros or not any(zeros):
        return None
    # the middle of a 2-bit grid is 1.5, so that 1 is a zero point of 2 bits too
    return max(2, round(math.log2(max(1.0, float(torch.tensor(zeros).median())))) + 1)


def _check_activations(
    path: str | Path, architecture: Architecture, state: Mapping[str, Tensor], config: QuantConfig
) -> None:
    zeros = [tensor for name, tensor in state.items() if ".act_quantizer" in name and name.endswith(".zero_point")]
    symmetric = all(bool((zero == 0).all()) for zero in zeros)
    if symmetric != config.a_sym:
        given, file = ("with", "asymmetric") if config.a_sym else ("without", "symmetric")
        message = f" mismatch: called {given} it, but the activations of the file are {file}"
        raise CheckpointError(message, field="a_sym", where=f"{path}: ")
    found = infer_act_bits(architecture, state)
    if found is None:
        message = "%s: it does not show the width of its activations: %d bits are taken as given"
        log.warning(message, path, config.act_bit)
    elif found != config.act_bit:
        message = f" {config.act_bit} was given, but the activation zero points of the file are those of {found} bits"
        raise CheckpointError(message, field="act_bit", where=f"{path}: ")
    steps = [float(t) for name, t in state.items() if name.endswith(".act_quantizer_w.delta")]
    # A probability is at most 1. At 16 bits no step exceeds 1 / 32767; at 8 bits, steps that are all below this would
    # mean that no attention weight ever exceeds 0.008.
    if steps and config.sm_abit == 16 and max(steps) > 2 / 32767:
        message = f" 16 was given, but a softmax step size of {max(steps):.2g} is too coarse for 16 bits"
        raise CheckpointError(message, field="sm_abit", where=f"{path}: ")
    if steps and config.sm_abit <= 8 and max(steps) <= 1 / 32767:
        message = f" {config.sm_abit} was given, but softmax step sizes of {max(steps):.2g} are those of 16 bits"
        raise CheckpointError(message, field="sm_abit", where=f"{path}: ")
