"""Wrapping: replaces the layers of a full-precision network by quantized ones, as its architecture describes."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.architecture import Architecture, AttentionMatMulSpec
from qdiff.attention import add_matmuls, matmul_names
from qdiff.calls import time_argument
from qdiff.config import QuantConfig
from qdiff.errors import ConfigError
from qdiff.layers import (
    HALF,
    LAYER_TYPES,
    ActQuantizer,
    MatMul,
    Quantizer,
    QuantLayer,
    QuantMatMul,
    TimestepGroups,
    has_own_behavior,
)
from qdiff.policy import unused_patterns
from qdiff.refusals import kept_ids, validate_layers


@dataclass(frozen=True)
class QuantPlan:
    """The modules of a network that are quantized, by path. A packed file of a custom network stores its plan.

    Attributes:
        layers: for each layer the number of input channels in the first half of its concatenated input; 0: the input
            is not split.
        matmuls: the attention matmuls.
        forms: for each layer its type and geometry, as PyTorch prints it.
        calls: for each module that multiplies activations by function calls the names of these calls, in order
            (`qdiff.attention`). The attention matmuls that compute them are named `matmul_0`, `matmul_1`, ...
    """

    layers: Mapping[str, int]
    matmuls: Mapping[str, AttentionMatMulSpec] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    calls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture, config: QuantConfig) -> "QuantPlan":
        """The plan for `model`.

        Args:
            model: the full-precision network.
            architecture: its architecture.
            config: whether concatenated shortcuts are split, and what its policy keeps in full precision.

        Raises:
            ConfigError: a pattern of the policy matches neither a layer nor a matmul, or the policy keeps all layers.
            TypeError: a module can be neither quantized nor left in full precision, or a block has no attention matmul
                of a name that the architecture lists. The message has the path and the type.
        """
        validate_layers(model, architecture)
        unquantized = kept_ids(model, architecture)
        splits = architecture.split_points(model) if config.split else {}
        # by identity, because one layer may stand at several paths
        split_channels = {id(model.get_submodule(path)): channels for path, channels in splits.items()}
        layers, matmuls = {}, {}
        for path, module in model.named_modules():
            if id(module) in unquantized:
                continue
            if type(module) in LAYER_TYPES:
                layers[path] = split_channels.get(id(module), 0)
            for name, spec in architecture.attention_matmuls.get(type(module), {}).items():
                if not isinstance(getattr(module, name, None), MatMul):
                    raise TypeError(
                        f"{path or 'the network'}: {type(module).__name__} has no attention matmul {name} "
                        "(expected a qdiff.layers.MatMul)"
                    )
                matmuls[f"{path}.{name}".lstrip(".")] = spec
        called = _matmuls_of_calls(model, architecture) if config.quant_act else {}
        matmuls |= called
        if unused := unused_patterns(config.policy, [*layers, *matmuls]):
            raise ConfigError(f" {unused[0]!r}: no layer or attention matmul has such a path", field="policy")
        layers = {path: split for path, split in layers.items() if not config.keeps(path)}
        if config.policy and not layers:
            raise ConfigError(": every layer would stay in full precision; expected some to be quantized", "policy")
        matmuls = {path: spec for path, spec in matmuls.items() if not config.keeps(path)}
        calls: dict[str, tuple[str, ...]] = {}
        if any(path in matmuls for path in called):
            owners = {path.rpartition(".")[0] for path in called if path in matmuls}
            # one without a quantized matmul must not be taken for a part of one around it; there is none around ""
            calls = {
                path: tuple(call.name for call in made)
                for path, made in architecture.calls.items()
                if path or path in owners
            }
        return cls(layers, matmuls, {path: repr(model.get_submodule(path)) for path in layers}, calls)

    def validate(self, model: nn.Module) -> None:
        """Check that `model` has the layers of the plan, in their forms.

        Raises:
            AttributeError: it has no module at a path of the plan.
            TypeError: a layer has another type or geometry, a hook, or its own `forward`. The message has its path.
        """
        for path, form in self.forms.items():
            layer = model.get_submodule(path)
            if repr(layer) != form:
                raise TypeError(f"{path} is {layer!r}, expected {form}")
            if has_own_behavior(layer):
                raise TypeError(f"{path} has a hook or a `forward` of its own, which would be lost")

    def to_dict(self) -> dict[str, Any]:
        """The plan in types that JSON has."""
        matmuls = {path: asdict(spec) for path, spec in self.matmuls.items()}
        values = {"layers": dict(self.layers), "matmuls": matmuls, "forms": dict(self.forms)}
        return values | ({"calls": {path: list(calls) for path, calls in self.calls.items()}} if self.calls else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantPlan":
        """Undo `to_dict`; older files have no `calls`.

        Raises:
            KeyError: a key is missing.
            TypeError: a value has another type, or an attention matmul has other fields.
        """
        matmuls = {
            path: AttentionMatMulSpec(**spec | {"operands": tuple(spec["operands"])})
            for path, spec in values["matmuls"].items()
        }
        layers = {path: int(split) for path, split in values["layers"].items()}
        calls = {path: tuple(names) for path, names in values.get("calls", {}).items()}
        return cls(layers, matmuls, dict(values["forms"]), calls)


def quantize_model(model: nn.Module, architecture: Architecture, config: QuantConfig) -> nn.Module:
    """A copy of `model`, in eval mode, with every layer and attention matmul replaced by its quantized form.

    The copy shares its parameters with `model` until the integers of a layer are set; `model` itself is not changed.
    Nothing is quantized yet: weights are in full precision and activation quantizers are off. With timestep groups the
    time step is found by `qdiff.calls.time_argument`.

    Raises:
        TypeError: a layer has parameters and no registered quantized form, or has hooks or its own `forward`; or a
            block has no attention matmul of a name that the architecture lists. The message has the path and the type.
    """
    return apply_plan(model, QuantPlan.of(model, architecture, config), config)


def apply_plan(model: nn.Module, plan: QuantPlan, config: QuantConfig) -> nn.Module:
    """A copy of `model` with quantized forms of the modules that `plan` lists; see `quantize_model`.

    Raises:
        AttributeError: the model has no module, or no attention matmul, at a path of the plan.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return wrap(copy.deepcopy(model, shared), plan, config)


def wrap(model: nn.Module, plan: QuantPlan, config: QuantConfig) -> nn.Module:
    """Replace the modules that `plan` lists by their quantized forms, in place; see `apply_plan`.

    Returns:
        `model`, in eval mode.
    """
    config.validate_formats()
    model.eval()
    groups = TimestepGroups(config.time_bounds) if config.time_bounds else None
    if groups is not None:
        model.timestep_groups = groups  # type: ignore[assignment]  # an attribute, so that a copy gets its own
        model.register_forward_pre_hook(set_timesteps, with_kwargs=True)
    splits = {id(model.get_submodule(path)): split for path, split in plan.layers.items()}
    device = next(model.parameters()).device

    def make_quantized(path: str, module: nn.Module) -> nn.Module | None:
        if id(module) not in splits:
            return None
        layer_type, (weight_bit, act_bit) = LAYER_TYPES[type(module)], config.widths(path)
        return layer_type(module, weight_bit, act_bit, config.a_sym, splits[id(module)], groups)

    replace_modules(model, make_quantized)
    _put_matmuls(model, plan, {path: spec.make(config, groups, path).to(device) for path, spec in plan.matmuls.items()})
    for path, module in model.named_modules():
        if isinstance(module, Quantizer):
            module.name = path
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused form would take the weights and leave out the quantizers
    return model.eval()


def _put_matmuls(model: nn.Module, plan: QuantPlan, matmuls: Mapping[str, QuantMatMul]) -> None:
    """Put attention matmuls where `plan` has them: in the place of modules, or behind function calls."""
    of_owners: dict[str, dict[str, QuantMatMul]] = {owner: {} for owner in plan.calls}
    for path, matmul in matmuls.items():
        parent, _, name = path.rpartition(".")
        block = model.get_submodule(parent)
        if isinstance(getattr(block, name, None), MatMul):
            setattr(block, name, matmul)
        elif parent in of_owners:
            of_owners[parent][name] = matmul
        else:
            raise AttributeError(f"{path} is no attention matmul (expected a qdiff.layers.MatMul)")
    for owner, named in of_owners.items():
        add_matmuls(model.get_submodule(owner), owner, plan.calls[owner], named)


def _matmuls_of_calls(model: nn.Module, architecture: Architecture) -> dict[str, AttentionMatMulSpec]:
    """The attention matmuls that function calls compute and that are not kept in full precision, by path."""
    kept = kept_ids(model, architecture)
    found: dict[str, AttentionMatMulSpec] = {}
    for owner, calls in architecture.calls.items():
        if id(model.get_submodule(owner)) in kept:
            continue
        for call, names in zip(calls, matmul_names([call.name for call in calls]), strict=True):
            paths = [f"{owner}.{name}".lstrip(".") for name in names]
            for path, probabilities in zip(paths, call.probabilities, strict=False):  # kept calls have none
                if not architecture.keeps(path):
                    found[path] = AttentionMatMulSpec.of_call(probabilities)
    return found


def is_inside(path: str, outer: str) -> bool:
    """Whether the module at `path` lies inside the module at `outer`. The path of the network itself is empty."""
    return path != outer and (not outer or path.startswith(f"{outer}."))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the quantized weights and the parameters of `source` to `target`, but not its activation quantizers.

    Both are quantized forms of one network.
    """
    for path, layer in quant_layers(source).items():
        target.get_submodule(path).register_buffer("smoothing", layer.smoothing)
    activation_state = {name: tensor for name, tensor in target.state_dict().items() if ".act_quantizer" in f".{name}"}
    target.load_state_dict(source.state_dict() | activation_state, assign=True)
    for layer in quant_layers(target).values():
        layer.freeze()


def set_timesteps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward hook that sets the timestep groups from the time step among the inputs: of each sample [N], or one."""
    groups = find_timestep_groups(model)
    assert groups is not None  # the hook is registered only for networks with timestep groups
    place = time_argument(model, args, kwargs)
    if place is None:
        raise ConfigError(": the network was called without a time step", field="timestep_groups")
    groups.set(torch.as_tensor(kwargs[place] if isinstance(place, str) else args[place]).flatten())


def replace_modules(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Replace modules inside `model`.

    Args:
        model: the network; it is changed in place.
        replacement: returns the new module for a path and the module there, or None if the module stays. It is called
            once for each module, even if the module stands at several paths.
    """
    replacements: dict[int, nn.Module | None] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in replacements:
            replacements[id(module)] = replacement(path, module)
        if (new := replacements[id(module)]) is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of `model`, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLayer)}


def half_precision(model: nn.Module) -> torch.dtype | None:
    """The half precision that layers of `model` compute in; None: they compute in float32."""
    return next((layer.dtype for layer in quant_layers(model).values() if layer.dtype in HALF), None)


def act_quantizers(model: nn.Module) -> dict[str, ActQuantizer]:
    """The activation quantizers of `model`, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ActQuantizer)}


def find_timestep_groups(model: nn.Module) -> TimestepGroups | None:
    """The timestep groups that the activation quantizers of `model` share; None: every scale serves all time steps."""
    return getattr(model, "timestep_groups", None)


def enable_activations(model: nn.Module, enabled: bool) -> None:
    """Switch every activation quantizer of `model` on or off, and use the parameters of that mode.

    Biases and norms that were fine-tuned with quantized activations serve badly without them, so a network may have
    values of its own for each mode (`set_mode_parameters`).
    """
    for quantizer in act_quantizers(model).values():
        quantizer.enabled = enabled
    for name, parameter in mode_parameters(model, enabled).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, parameter)


def set_mode_parameters(model: nn.Module, weights_only: Mapping[str, Tensor]) -> None:
    """Give a network other values of some parameters while its activation quantizers are off.

    Args:
        model: a quantized network, whose parameters now are those for quantized activations.
        weights_only: the values without quantized activations, by the names of the parameters.

    Raises:
        AttributeError: the network has no such parameter.
    """
    current = {name: model.get_parameter(name) for name in weights_only}
    others = {name: nn.Parameter(value.detach(), requires_grad=False) for name, value in weights_only.items()}
    # an attribute, so that a copy of the network gets its own
    model.parameters_of_modes = {True: current, False: others}  # type: ignore[assignment]


def mode_parameters(model: nn.Module, activations: bool) -> dict[str, nn.Parameter]:
    """The parameters, by name, that have other values with quantized activations than without: those of one mode."""
    modes: dict[bool, dict[str, nn.Parameter]] = getattr(model, "parameters_of_modes", {})
    return modes.get(activations, {})


def init_weights(model: nn.Module, method: str) -> None:
    """Quantize every weight by nearest rounding, with scales by the rule `method` (`qdiff.scale_rules`)."""
    for layer in quant_layers(model).values():
        layer.init_weight_scales(method)


def units(model: nn.Module, architecture: Architecture) -> list[str]:
    """The paths of the reconstruction units: the blocks, the separate layers of blocks, and the layers outside blocks.

    They come in the order of the modules; the calibration sorts them by order of execution.

    Raises:
        ConfigError: a block lies inside another block.
    """
    paths: list[str] = []
    blocks: list[str] = []
    for path, module in model.named_modules():
        inside = any(is_inside(path, block) for block in blocks)
        if architecture.is_block(path, module) and any(
            isinstance(inner, QuantLayer | QuantMatMul) for inner in module.modules()
        ):
            if inside:
                outer = next(block for block in blocks if is_inside(path, block))
                where = outer or "the network itself"
                raise ConfigError(
                    f": {path} ({type(module).__name__}) lies inside {where}: expected blocks apart from one another",
                    field="blocks",
                )
            blocks.append(path)
            paths.append(path)
        elif isinstance(module, QuantLayer) and (not inside or architecture.is_separate(path)):
            paths.append(path)
    return paths


def unit_modules(unit: nn.Module, architecture: Architecture) -> Iterator[tuple[str, QuantLayer | QuantMatMul]]:
    """The quantized layers and attention matmuls of a unit, by path. Separate layers are not among them."""
    for path, module in unit.named_modules():
        if isinstance(module, QuantLayer | QuantMatMul) and (not path or not architecture.is_separate(path)):
            yield path, module
