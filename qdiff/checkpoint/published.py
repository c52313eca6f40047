"""The published format: the state dict of a quantized network, written by `torch.save`.

Its names have the prefix `model.`. It holds full-precision weights, and the alphas that decide how they are rounded.
Bit widths are not stored; they are inferred if possible, and compared with the settings given. So it has no place for
widths per layer, smoothing, timestep groups or parameters of both modes.
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
    describe_state,
    has_activation_scales,
    has_split,
    read_tensors,
    validate_finite,
    validate_keys,
)
from qdiff.config import QuantConfig
from qdiff.errors import CheckpointError
from qdiff.layers import LAYER_TYPES, MatMul, QuantConvTranspose
from qdiff.model import (
    act_quantizers,
    enable_activations,
    find_timestep_groups,
    mode_parameters,
    quant_layers,
    quantize_model,
)
from qdiff.refusals import kept_ids
from qdiff.utils.files import atomic_write

log = logging.getLogger(__name__)

PREFIX = "model."


def published_names(model: nn.Module, architecture: Architecture) -> dict[str, str]:
    """The name in a published file of each quantizer of an attention matmul, by its path in `model`."""
    names = {}
    for path, module in model.named_modules():
        for attribute, spec in architecture.attention_matmuls.get(type(module), {}).items():
            for operand in spec.operands:
                own_path = f"{path}.{attribute}.act_quantizer_{operand}"
                names[own_path] = f"{path}.act_quantizer_{operand}" if spec.on_block else own_path
    return names


def published_shapes(model: nn.Module, architecture: Architecture, activations: bool = True) -> dict[str, torch.Size]:
    """The names of all tensors in the published file of a quantized network, with their shapes.

    Args:
        model: the quantized network.
        architecture: its architecture.
        activations: include the activation scales.
    """
    shapes: dict[str, torch.Size] = {name: parameter.shape for name, parameter in model.named_parameters()}
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


def not_publishable(model: nn.Module, architecture: Architecture) -> str | None:
    """What of a quantized network the published format cannot hold, by name; None: it can hold all of it.

    Args:
        model: the quantized network.
        architecture: its architecture.
    """
    if find_timestep_groups(model) is not None:
        return "one scale for all time steps, not timestep groups"
    layers, acts = quant_layers(model), act_quantizers(model)
    if smoothed := [path for path, layer in layers.items() if layer.smoothing is not None]:
        return f"no smoothing, but {smoothed[0]} has one"
    if transposed := [path for path, layer in layers.items() if isinstance(layer, QuantConvTranspose)]:
        return f"no transposed convolutions, but {transposed[0]} is one"
    known = kept_ids(model, architecture)
    for path, module in model.named_modules():
        if (type(module) in LAYER_TYPES and id(module) not in known) or isinstance(module, MatMul):
            return f"no layers in full precision, but {path} is one"
    widths = (
        {path: layer.weight_quantizer.n_bits for path, layer in layers.items()},
        {path: quantizer.n_bits for path, quantizer in acts.items() if not quantizer.is_softmax},
        {path: quantizer.n_bits for path, quantizer in acts.items() if quantizer.is_softmax},
    )
    for bits in widths:
        common = max(bits.values(), key=list(bits.values()).count, default=0)
        if odd := [path for path in bits if bits[path] != common]:
            return f"one width for all layers, but {odd[0]} has {bits[odd[0]]} bits and others have {common}"
    return None


def save_published(
    path: str | Path, model: nn.Module, architecture: Architecture, weights: Mapping[str, Tensor], activations: bool
) -> None:
    """Write the published format.

    Args:
        path: the file to write.
        model: the quantized network.
        architecture: its architecture.
        weights: the full-precision state dict of the network.
        activations: write the activation scales too.

    Raises:
        CheckpointError: the network has what this format cannot hold (`not_publishable`), or its integers are not a
            rounding of `weights`.
    """
    if (reason := not_publishable(model, architecture)) is not None:
        raise CheckpointError(f"{path}: the published format holds {reason}")
    if own := mode_parameters(model, activations):
        mode = "with" if activations else "without"
        message = "%s: the published format holds one mode: the biases and norms for use %s quantized activations"
        log.info(message, path, mode)
    parameters = dict(model.named_parameters()) | own
    state: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    for layer_path, layer in quant_layers(model).items():
        weight = weights[f"{layer_path}.weight"].detach().float().cpu()
        state[f"{layer_path}.weight"] = weight
        for (name, quantizer), part in zip(layer.named_weight_quantizers(), layer._parts(weight), strict=True):
            stem = f"{layer_path}.{name}"
            scale, zero_point = quantizer.scale.cpu(), quantizer.zero_point.cpu()
            integers = quantizer.integers.cpu().float()
            alpha = Q.alpha_from_integers(part, integers, scale, zero_point)
            if not torch.equal(Q.hard_integers(part, alpha, scale, zero_point, quantizer.n_bits), integers):
                raise CheckpointError(
                    f"{path}: {layer_path}: its integers are not a rounding of the full-precision weights given"
                )
            state[f"{stem}.alpha"] = alpha
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = scale, zero_point
    if activations:
        renamed = published_names(model, architecture)
        for name, act_quantizer in act_quantizers(model).items():
            stem = renamed.get(name, name)
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = act_quantizer.scale, act_quantizer.zero_point
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
    ):  # given a path, torch stores its name in the file
        torch.save({PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}, file)


def midpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """Substitutes for full-precision weights that are not available: the middle of each rounding interval."""
    weights = {}
    for name, layer in quant_layers(model).items():
        parts = [
            (quantizer.integers.float() - quantizer.zero_point + 0.5) * quantizer.scale
            for quantizer in layer.weight_quantizers
        ]
        weights[f"{name}.weight"] = torch.cat(parts, dim=1)
    return weights


def load_published(
    path: str | Path, unet_config: Mapping[str, Any], architecture: Architecture, config: QuantConfig
) -> nn.Module:
    """Load a quantized network from a published file, without a forward pass or a second copy of the weights.

    Args:
        path: the file.
        unet_config: the configuration of the network, for `architecture.make_unet`.
        architecture: its architecture.
        config: the number formats. They are compared with those that can be inferred from the file.

    Raises:
        CheckpointError: the file is damaged, holds another network, or has other bit widths, another symmetry or
            another split than `config`.
    """
    state = read_tensors(path)
    _validate_split(path, state, config)
    activations = has_activation_scales(state)
    if config.quant_act and not activations:
        message = " was given, but the file holds no activation scales (weights only)"
        raise CheckpointError(message, field="quant_act", where=f"{path}: ")
    with torch.device("meta"):
        model = quantize_model(architecture.make_unet(dict(unet_config)), architecture, config)
    validate_keys(published_shapes(model, architecture, activations), state, path)
    validate_finite(path, state)
    _validate_scales(path, state)
    _validate_weight_bits(path, model, state, config.weight_bit)
    if config.quant_act:
        _validate_activations(path, architecture, state, config)
    _assign_published(model, architecture, state, activations)
    enable_activations(model, config.quant_act)
    return model


def _assign_published(
    model: nn.Module, architecture: Architecture, state: Mapping[str, Tensor], activations: bool
) -> None:
    """Assign the tensors of a published file to the quantized network, with each weight rounded to its integer."""
    parameters = {name: state[PREFIX + name].float().clone() for name, _ in model.named_parameters()}
    assign_parameters(model, parameters)
    for path, layer in quant_layers(model).items():
        integers = []
        weight = state[f"{PREFIX}{path}.weight"].float()
        for (name, quantizer), part in zip(layer.named_weight_quantizers(), layer._parts(weight), strict=True):
            stem = f"{PREFIX}{path}.{name}"
            scale, zero_point = state[f"{stem}.delta"].float().clone(), state[f"{stem}.zero_point"].float().clone()
            quantizer.scale, quantizer.zero_point = scale, zero_point
            alpha = state[f"{stem}.alpha"].float()
            integers.append(Q.hard_integers(part, alpha, scale, zero_point, quantizer.n_bits))
        layer.set_integers(integers)
    renamed = published_names(model, architecture)
    for path, act_quantizer in act_quantizers(model).items():
        stem = PREFIX + renamed.get(path, path)
        act_quantizer.scale = state[f"{stem}.delta"].float().clone() if activations else torch.tensor(float("nan"))
        act_quantizer.zero_point = state[f"{stem}.zero_point"].float().clone() if activations else torch.tensor(0.0)


def _validate_split(path: str | Path, state: Mapping[str, Tensor], config: QuantConfig) -> None:
    """Raise CheckpointError if shortcuts are split in the file and not in `config`, or the other way round."""
    if has_split(state) != config.split and any(".weight_quantizer." in key for key in state):
        given, stored = ("with", "without") if config.split else ("without", "with")
        message = f" mismatch: called {given} it, but the file was written {stored} it; {describe_state(state)}"
        raise CheckpointError(message, field="split", where=f"{path}: ")


def _validate_scales(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a scale of zero."""
    for name, tensor in state.items():
        if name.endswith(".delta") and (tensor == 0).any():
            raise CheckpointError(f"{path}: damaged: {name} holds a scale of zero")


def infer_weight_bits(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Infer the bit width of the weights from their scales; None if the scales do not show it.

    For each channel (max w - min w) / scale is (2^b - 1) / f, with a shrink factor f in [0.21, 1]. In most tensors f is
    near 1 for some channel, so the smallest ratio of each tensor votes for a width.
    """
    votes: list[int] = []
    for path, layer in quant_layers(model).items():
        weight = state[f"{PREFIX}{path}.weight"].float()
        for (name, _), part in zip(layer.named_weight_quantizers(), layer._parts(weight), strict=True):
            channels, scale = part.flatten(1), state[f"{PREFIX}{path}.{name}.delta"].flatten()
            ratio = ((channels.amax(1) - channels.amin(1)) / scale)[scale > 10 * Q.MIN_SCALE]
            if len(ratio) == 0 or ratio.min() <= 0:
                continue
            n_bits = round(torch.log2(ratio.min() + 1).item())
            # the search must be able to choose the shrink factor of this ratio, and must choose it often
            if 0.98 <= ratio.min().item() / (2**n_bits - 1) <= 1.4:
                votes.append(n_bits)
    total = sum(len(layer.weight_quantizers) for layer in quant_layers(model).values())
    if not votes:
        return None
    winner = max(set(votes), key=votes.count)
    return winner if votes.count(winner) > 0.8 * total else None


def _validate_weight_bits(path: str | Path, model: nn.Module, state: Mapping[str, Tensor], weight_bit: int) -> None:
    """Raise CheckpointError if the scales of the weights show another width; warn if they do not show any."""
    inferred = infer_weight_bits(model, state)
    if inferred is None:
        log.warning("%s: it does not show the width of its weights: weight_bit %d is taken as given", path, weight_bit)
    elif inferred != weight_bit:
        message = f" {weight_bit} was given, but the scales of the file are those of {inferred}-bit weights"
        raise CheckpointError(message, field="weight_bit", where=f"{path}: ")


def infer_act_bits(architecture: Architecture, state: Mapping[str, Tensor]) -> int | None:
    """Infer the bit width of asymmetric activations from their zero points; None if the file does not show it.

    x_t and the q and k of attention are distributed symmetrically about 0, so their zero points lie near 2^(b - 1).
    The width b follows from their median. Symmetric quantization has zero points of 0 at every width.
    """
    names = {f".{architecture.input_layer}.act_quantizer.zero_point"} if architecture.input_layer else set()
    for specs in architecture.attention_matmuls.values():
        for spec in specs.values():
            if spec.softmax is None:  # q and k
                names |= {f".act_quantizer_{operand}.zero_point" for operand in spec.operands}
    zero_points = [float(tensor) for name, tensor in state.items() if name.endswith(tuple(names))]
    if not zero_points or not any(zero_points):
        return None
    # the middle of a 2-bit grid is 1.5, so a zero point of 1 means 2 bits too
    return max(2, round(math.log2(max(1.0, float(torch.tensor(zero_points).median())))) + 1)


def _validate_activations(
    path: str | Path, architecture: Architecture, state: Mapping[str, Tensor], config: QuantConfig
) -> None:
    """Raise CheckpointError if the file shows another symmetry or other widths of activations than `config`."""
    suffix = ".zero_point"
    zero_points = [tensor for name, tensor in state.items() if ".act_quantizer" in name and name.endswith(suffix)]
    symmetric = all(bool((zero_point == 0).all()) for zero_point in zero_points)
    if symmetric != config.a_sym:
        given, stored = ("with", "asymmetric") if config.a_sym else ("without", "symmetric")
        message = f" mismatch: called {given} it, but the activations of the file are {stored}"
        raise CheckpointError(message, field="a_sym", where=f"{path}: ")
    inferred = infer_act_bits(architecture, state)
    if inferred is None:
        message = "%s: it does not show the width of its activations: act_bit %d is taken as given"
        log.warning(message, path, config.act_bit)
    elif inferred != config.act_bit:
        message = (
            f" {config.act_bit} was given, but the activation zero points of the file are those of {inferred} bits"
        )
        raise CheckpointError(message, field="act_bit", where=f"{path}: ")
    _validate_softmax_bits(path, architecture, state, config.sm_abit)


def _validate_softmax_bits(
    path: str | Path, architecture: Architecture, state: Mapping[str, Tensor], sm_abit: int
) -> None:
    """Raise CheckpointError if the scales of attention probabilities do not fit `sm_abit` bits.

    A probability is at most 1, so at 16 bits no scale exceeds 1 / 32767. At 8 bits, scales that are all below this
    would mean that no attention probability ever exceeds 0.008.
    """
    specs = [spec for by_name in architecture.attention_matmuls.values() for spec in by_name.values()]
    names = tuple(f".act_quantizer_{spec.softmax}.delta" for spec in specs if spec.softmax is not None)
    scales = [float(tensor) for name, tensor in state.items() if name.endswith(names)]
    if scales and sm_abit == 16 and max(scales) > 2 / 32767:
        message = f" 16 was given, but a softmax scale of {max(scales):.2g} is too coarse for 16 bits"
        raise CheckpointError(message, field="sm_abit", where=f"{path}: ")
    if scales and sm_abit <= 8 and max(scales) <= 1 / 32767:
        message = f" {sm_abit} was given, but softmax scales of {max(scales):.2g} are those of 16 bits"
        raise CheckpointError(message, field="sm_abit", where=f"{path}: ")
