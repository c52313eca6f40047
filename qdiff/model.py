"""Wrapping: a full-precision network becomes a quantized one, layer by layer, as its architecture says."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qdiff.architecture import Architecture, AttentionMatMulSpec
from qdiff.config import QuantConfig
from qdiff.errors import ConfigError
from qdiff.layers import LAYER_TYPES, ActQuantizer, MatMul, Quantizer, QuantLayer, QuantMatMul, TimestepGroups

NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
UNQUANTIZED = (*NORMS, nn.Embedding, nn.PReLU)


@dataclass(frozen=True)
class QuantPlan:
    """Which modules of a network are quantized, by path. It rebuilds the quantized form of a network from its file.

    Attributes:
        layers: the layers, each with the input channels of the first half of its concatenated input (0: not split).
        matmuls: the attention matmuls.
    """

    layers: Mapping[str, int]
    matmuls: Mapping[str, AttentionMatMulSpec] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture, split: bool) -> "QuantPlan":
        """What `architecture` says of `model`; `split`: concatenated shortcuts get two quantizers.

        Raises:
            TypeError: a module that can be neither quantized nor kept, by path and type; a block without an attention
                matmul that the architecture names.
        """
        validate_layers(model, architecture)
        kept = _kept(model, architecture)
        splits = architecture.split_points(model) if split else {}
        split_of = {
            id(model.get_submodule(path)): channels for path, channels in splits.items()
        }  # one layer, several paths
        layers, matmuls = {}, {}
        for path, module in model.named_modules():
            if id(module) in kept:
                continue
            if type(module) in LAYER_TYPES:
                layers[path] = split_of.get(id(module), 0)
            for name, spec in architecture.attention_matmuls.get(type(module), {}).items():
                if not isinstance(getattr(module, name, None), MatMul):
                    raise TypeError(
                        f"{path or 'the network'}: {type(module).__name__} has no attention matmul {name} "
                        "(expected a qdiff.layers.MatMul)"
                    )
                matmuls[f"{path}.{name}".lstrip(".")] = spec
        return cls(layers, matmuls)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        return {"layers": dict(self.layers), "matmuls": {path: asdict(spec) for path, spec in self.matmuls.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantPlan":
        """Rebuild from `to_dict`.

        Raises:
            KeyError, TypeError: another structure.
        """
        matmuls = {
            path: AttentionMatMulSpec(**spec | {"operands": tuple(spec["operands"])})
            for path, spec in values["matmuls"].items()
        }
        return cls({path: int(split) for path, split in values["layers"].items()}, matmuls)


def quantize_model(model: nn.Module, architecture: Architecture, config: QuantConfig) -> nn.Module:
    """A copy of `model`, in eval mode, with every layer and attention matmul replaced by its quantized form.

    Parameters are shared with `model` until a layer's integers are set; `model` itself is not changed. Nothing is
    quantized
    yet: weights are in full precision and activation quantizers are off. With timestep groups the second input of the
    network is the time step of each sample.

    Raises:
        TypeError: a layer with parameters that the registry does not know, or that has hooks or a `forward` of its
            own, by path and type; a block without an attention matmul of the architecture.
        NotImplementedError: a layer that is known, but not in this form, by path.
    """
    return apply_plan(model, QuantPlan.of(model, architecture, config.split), config)


def apply_plan(model: nn.Module, plan: QuantPlan, config: QuantConfig) -> nn.Module:
    """A copy of `model` in which the modules of `plan` are quantized; see `quantize_model`.

    Raises:
        AttributeError: the model has no module, or no attention matmul, at a path of the plan.
        NotImplementedError: a layer that is known, but not in this form, by path.
    """
    config.validate()
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    wrapped = copy.deepcopy(model, shared).eval()
    groups = TimestepGroups(config.time_bounds) if config.time_bounds else None
    if groups is not None:
        wrapped.timestep_groups = groups  # type: ignore[assignment]  # an attribute, so that copies have their own
        wrapped.register_forward_pre_hook(_set_timesteps)
    splits = {id(wrapped.get_submodule(path)): split for path, split in plan.layers.items()}
    device = next(model.parameters()).device

    def quantized(path: str, module: nn.Module) -> nn.Module | None:
        if id(module) not in splits:
            return None
        make, split = LAYER_TYPES[type(module)], splits[id(module)]
        try:
            return make(module, config.weight_bit, config.act_bit, config.a_sym, split, groups)
        except NotImplementedError as error:
            raise NotImplementedError(f"{path or 'the network'}: {error}") from None

    replace_modules(wrapped, quantized)
    for path, spec in plan.matmuls.items():
        parent, _, name = path.rpartition(".")
        block = wrapped.get_submodule(parent)
        if not isinstance(getattr(block, name, None), MatMul):
            raise AttributeError(f"{path} is no attention matmul (expected a qdiff.layers.MatMul)")
        setattr(block, name, spec.make(config, groups).to(device))
    for path, module in wrapped.named_modules():
        if isinstance(module, Quantizer):
            module.name = path
    return wrapped.eval()


def validate_layers(model: nn.Module, architecture: Architecture) -> None:
    """Check that every module of `model` can be quantized or is kept.

    Raises:
        TypeError: the first that is neither, by path and type.
    """
    kept = _kept(model, architecture)
    for path, module in model.named_modules():
        if id(module) in kept:
            continue
        if type(module) not in LAYER_TYPES:
            own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
            if not all(architecture.keeps(name) for name in own):
                raise TypeError(
                    f"{path or 'the network'}: no quantized form registered for {type(module).__name__}, "
                    "expected it among `keep`"
                )
        elif has_own_behavior(module):
            raise TypeError(
                f"{path or 'the network'}: a hook or a `forward` of its own would be lost; "
                "remove it, or name it in `keep`"
            )


def _kept(model: nn.Module, architecture: Architecture) -> set[int]:
    """The ids of modules whose own parameters stay as they are, by any of their paths."""
    kept: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if architecture.keeps(path):
            kept |= {id(inner) for inner in module.modules()}
        elif isinstance(module, UNQUANTIZED):
            kept.add(id(module))
        elif type(module) in architecture.keep:
            whole = not list(module.parameters(recurse=False))
            kept |= {id(inner) for inner in module.modules()} if whole else {id(module)}
    return kept


def is_inside(path: str, outer: str) -> bool:
    """Whether the module at `path` lies inside the one at `outer` (the network's own path is empty)."""
    return path != outer and (not outer or path.startswith(f"{outer}."))


def has_own_behavior(module: nn.Module) -> bool:
    """Whether a module does something that one in its place would not: hooks, or a `forward` of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the quantized weights and the parameters of `source`; its activation quantizers stay as they are.

    Both are quantized forms of one network.
    """
    own = {name: tensor for name, tensor in target.state_dict().items() if ".act_quantizer" in f".{name}"}
    target.load_state_dict(source.state_dict() | own, assign=True)
    for layer in quant_layers(target).values():
        layer.freeze()


def _set_timesteps(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward hook: the second input of the network is the time step of each sample."""
    groups = find_timestep_groups(model)
    assert groups is not None  # the hook is registered with them
    groups.set(inputs[1])


def replace_modules(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Replace modules inside `model`.

    Args:
        model: the network; changed in place.
        replacement: from a path and the module there to the new module, or to None if it stays. It is called once for
            each module, whatever the number of its paths.
    """
    found: dict[int, nn.Module | None] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):  # a module may stand at several paths
        if id(module) not in found:
            found[id(module)] = replacement(path, module)
        if (new := found[id(module)]) is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLayer)}


def act_quantizers(model: nn.Module) -> dict[str, ActQuantizer]:
    """Activation quantizers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ActQuantizer)}


def find_timestep_groups(model: nn.Module) -> TimestepGroups | None:
    """The timestep groups that the activation quantizers of `model` share; None: every scale serves all time steps."""
    return getattr(model, "timestep_groups", None)


def enable_activations(model: nn.Module, enabled: bool) -> None:
    """Switch every activation quantizer of `model` on or off."""
    for quantizer in act_quantizers(model).values():
        quantizer.enabled = enabled


def init_weights(model: nn.Module, method: str) -> None:
    """Quantize every weight to nearest, with scales by the rule `method` (`qdiff.scale_rules`)."""
    for layer in quant_layers(model).values():
        layer.init_weight_scales(method)


def units(model: nn.Module, architecture: Architecture) -> list[str]:
    """Reconstruction units by path: each block, each separate layer of a block, every layer outside blocks.

    The order is that of the modules; the calibration puts them in order of execution.

    Raises:
        ConfigError: a block inside another.
    """
    found: list[str] = []
    blocks: list[str] = []
    for path, module in model.named_modules():
        inside = any(is_inside(path, block) for block in blocks)
        if type(module) in architecture.blocks and any(
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
            found.append(path)
        elif isinstance(module, QuantLayer) and (not inside or architecture.is_separate(path)):
            found.append(path)
    return found


def unit_modules(unit: nn.Module, architecture: Architecture) -> Iterator[tuple[str, QuantLayer | QuantMatMul]]:
    """The quantized layers and matmuls that belong to a unit, by path: all inside it except the separate layers."""
    for path, module in unit.named_modules():
        if isinstance(module, QuantLayer | QuantMatMul) and (not path or not architecture.is_separate(path)):
            yield path, module
