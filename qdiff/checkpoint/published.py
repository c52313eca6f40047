"""The published format: `torch.save` of the wrapped network's state, prefix `model.`, full-precision weights with AdaRound's alpha.

Bit widths are not stored; they are inferred where possible and compared with the options.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

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


def published_names(model: nn.Module, family: Architecture) -> dict[str, str]:
    """From the path of each product's quantizer here to its name in a published file."""
    names = {}
    for path, module in model.named_modules():
        for attribute, product in family.products.get(type(module), {}).items():
            for operand in product.operands:
                inner = f"{path}.{attribute}.act_quantizer_{operand}"
                names[inner] = f"{path}.act_quantizer_{operand}" if product.on_block else inner
    return names


def published_shapes(model: nn.Module, family: Architecture, activations: bool = True) -> dict[str, torch.Size]:
    """Every key of the published file of a quantized `model`, with its shape."""
    shapes: dict[str, torch.Size] = {name: p.shape for name, p in model.named_parameters()}
    for path, layer in quant_layers(model).items():
        shapes[f"{path}.weight"] = cast(torch.Size, layer.shape)  # mypy sees Tensor | Module
        for suffix, quantizer in zip(("", "_0"), layer.weight_quantizers, strict=False):
            stem = f"{path}.weight_quantizer{suffix}"
            shapes[f"{stem}.alpha"] = quantizer.integers.shape
            shapes[f"{stem}.delta"] = shapes[f"{stem}.zero_point"] = quantizer.scale.shape
    if activations:
        renamed = published_names(model, family)
        for path in act_quantizers(model):
            stem = renamed.get(path, path)
            shapes[f"{stem}.delta"] = shapes[f"{stem}.zero_point"] = torch.Size([])
    return {PREFIX + name: shape for name, shape in shapes.items()}


def save_published(
    path: str | Path, model: nn.Module, family: Architecture, weights: Mapping[str, Tensor], activations: bool
) -> None:
    """Write the published format.

    Args:
        weights: the full-precision state dict of the network: the file stores weights with alphas.
        activations: write the activation step sizes too.

    Raises:
        CheckpointError: the network has time-step sets, which this format cannot hold, or the weights are those of another network.
    """
    if find_timestep_groups(model) is not None:
        raise CheckpointError(
            f"{path}: the published format holds one step size for all time steps, not time-step sets"
        )
    state: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    for name, layer in quant_layers(model).items():
        weight = weights[f"{name}.weight"].detach().float().cpu()
        state[f"{name}.weight"] = weight
        parts = zip(("", "_0"), layer.weight_quantizers, layer._parts(weight), strict=False)
        for suffix, quantizer, part in parts:
            stem = f"{name}.weight_quantizer{suffix}"
            scale, zero = quantizer.scale.cpu(), quantizer.zero_point.cpu()
            integers = quantizer.integers.cpu().float()
            alpha = Q.alpha_from_integers(part, integers, scale, zero)
            if not torch.equal(Q.hard_integers(part, alpha, scale, zero, quantizer.n_bits), integers):
                raise CheckpointError(
                    f"{path}: {name}: its integers are not a rounding of the full-precision weights given"
                )
            state[f"{stem}.alpha"] = alpha
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = scale, zero
    if activations:
        renamed = published_names(model, family)
        for name, act_quantizer in act_quantizers(model).items():
            stem = renamed.get(name, name)
            state[f"{stem}.delta"], state[f"{stem}.zero_point"] = act_quantizer.scale, act_quantizer.zero_point
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a path would leave its name inside
        torch.save({PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}, file)


def midpoint_weights(model: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for lost full-precision weights: the middle of each rounding interval, robust against its ends."""
    weights = {}
    for name, layer in quant_layers(model).items():
        parts = [(q.integers.float() - q.zero_point + 0.5) * q.scale for q in layer.weight_quantizers]
        weights[f"{name}.weight"] = torch.cat(parts, dim=1)
    return weights


def load_published(path: str | Path, build: dict, family: Architecture, config: QuantConfig) -> nn.Module:
    """A quantized network from a published file: no forward pass, no random data, no second copy.

    Args:
        build: the network's configuration, as `family.build` takes it.
        config: the options given; they are compared with what the file shows of itself.

    Raises:
        CheckpointError: another network, split or not, other widths or symmetry, damaged.
    """
    state = read_tensors(path)
    _check_split(path, state, config)
    activations = has_acts(state)
    if config.quant_act and not activations:
        raise CheckpointError(
            f"{path}: --quant_act was given, but the file holds no activation step sizes (weights only)"
        )
    with torch.device("meta"):
        model = quantize_model(family.build(build), family, config)
    check_keys(published_shapes(model, family, activations), state, path)
    check_finite(path, state)
    _check_steps(path, state)
    _check_weight_bits(path, model, state, config.weight_bit)
    if config.quant_act:
        _check_activations(path, family, state, config)
    _fill_published(model, family, state, activations)
    enable_activations(model, config.quant_act)
    return model


def _fill_published(model: nn.Module, family: Architecture, state: Mapping[str, Tensor], activations: bool) -> None:
    parameters = {name: state[PREFIX + name].float().clone() for name, _ in model.named_parameters()}
    assign_parameters(model, parameters)
    for path, layer in quant_layers(model).items():
        integers = []
        weight = state[f"{PREFIX}{path}.weight"].float()
        for suffix, quantizer, part in zip(("", "_0"), layer.weight_quantizers, layer._parts(weight), strict=False):
            stem = f"{PREFIX}{path}.weight_quantizer{suffix}"
            scale, zero = state[f"{stem}.delta"].float().clone(), state[f"{stem}.zero_point"].float().clone()
            quantizer.scale, quantizer.zero_point = scale, zero
            integers.append(Q.hard_integers(part, state[f"{stem}.alpha"].float(), scale, zero, quantizer.n_bits))
        layer.set_integers(integers)
    renamed = published_names(model, family)
    for path, act_quantizer in act_quantizers(model).items():
        stem = PREFIX + renamed.get(path, path)
        act_quantizer.scale = state[f"{stem}.delta"].float().clone() if activations else torch.tensor(float("nan"))
        act_quantizer.zero_point = state[f"{stem}.zero_point"].float().clone() if activations else torch.tensor(0.0)


def _check_split(path: str | Path, state: Mapping[str, Tensor], config: QuantConfig) -> None:
    if has_split(state) != config.split and any(".weight_quantizer." in key for key in state):
        given, file = ("with", "without") if config.split else ("without", "with")
        raise CheckpointError(
            f"{path}: --split mismatch: called {given} --split, but the file was made {file} it; {look_of(state)}"
        )


def _check_steps(path: str | Path, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if name.endswith(".delta") and (tensor == 0).any():
            raise CheckpointError(f"{path}: damaged: {name} holds a step size of zero")


def infer_weight_bits(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The width whose grid the step sizes were made for, or None where they tell nothing.

    Per channel (max w - min w) / delta is (2^b - 1) / f with a shrink factor f in [0.21, 1] that is near
    1 for some channel of most tensors; the least ratio of each tensor votes.
    """
    votes: list[int] = []
    for name, layer in quant_layers(model).items():
        weight = state[f"{PREFIX}{name}.weight"].float()
        for suffix, part in zip(("", "_0"), layer._parts(weight), strict=False):
            rows, scale = part.flatten(1), state[f"{PREFIX}{name}.weight_quantizer{suffix}.delta"].flatten()
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
        log.warning(
            "%s: the width of its weights cannot be told from it: --weight_bit %d is taken as given", path, weight_bit
        )
    elif found != weight_bit:
        raise CheckpointError(
            f"{path}: --weight_bit {weight_bit} was given, but the step sizes of the file are those of {found}-bit weights"
        )


def infer_act_bits(family: Architecture, state: Mapping[str, Tensor]) -> int | None:
    """The width of asymmetric activations, or None where nothing in the file tells it.

    x_t and the q and k of attention are symmetric about 0, so their zero points lie near 2^(b - 1): b is the width nearest to
    their median. Symmetric activations have zero points of 0 at every width.
    """
    names = {f".{family.input_layer}.act_quantizer.zero_point"} if family.input_layer else set()
    for products in family.products.values():
        for product in products.values():
            names |= {f".act_quantizer_{operand}.zero_point" for operand in product.operands if operand in ("q", "k")}
    zeros = [float(tensor) for name, tensor in state.items() if name.endswith(tuple(names))]
    if not zeros or not any(zeros):
        return None
    return round(math.log2(max(1.0, float(torch.tensor(zeros).median())))) + 1


def _check_activations(
    path: str | Path, family: Architecture, state: Mapping[str, Tensor], config: QuantConfig
) -> None:
    zeros = [tensor for name, tensor in state.items() if ".act_quantizer" in name and name.endswith(".zero_point")]
    symmetric = all(bool((zero == 0).all()) for zero in zeros)
    if symmetric != config.a_sym:
        given, file = ("with", "asymmetric") if config.a_sym else ("without", "symmetric")
        raise CheckpointError(
            f"{path}: --a_sym mismatch: called {given} --a_sym, but the activations of the file are {file}"
        )
    found = infer_act_bits(family, state)
    if found is None:
        log.warning(
            "%s: the width of its activations cannot be told from it: --act_bit %d is taken as given",
            path,
            config.act_bit,
        )
    elif found != config.act_bit:
        raise CheckpointError(
            f"{path}: --act_bit {config.act_bit} was given, but the activation zero points of the file are those of {found} bits"
        )
    steps = [float(t) for name, t in state.items() if name.endswith(".act_quantizer_w.delta")]
    # a probability is at most 1: at 16 bits no step exceeds 1 / 32767; at 8 bits all of them below that would
    # mean that no attention weight ever exceeds 0.008
    if steps and config.sm_abit == 16 and max(steps) > 2 / 32767:
        raise CheckpointError(
            f"{path}: --sm_abit 16 was given, but a softmax step size of {max(steps):.2g} is too coarse for 16 bits"
        )
    if steps and config.sm_abit <= 8 and max(steps) <= 1 / 32767:
        raise CheckpointError(
            f"{path}: --sm_abit {config.sm_abit} was given, but softmax step sizes of {max(steps):.2g} are those of 16 bits"
        )
