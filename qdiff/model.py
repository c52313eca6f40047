"""Wrapping: a full-precision network becomes a quantized one, guided by what its family registered."""

import copy
from collections.abc import Callable, Iterator

from torch import nn

from qdiff.architecture import Architecture
from qdiff.config import QuantConfig
from qdiff.errors import ConfigError
from qdiff.layers import LAYER_TYPES, ActQuantizer, MatMul, QuantLayer, QuantMatMul, TimestepGroups, WeightQuantizer

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
UNQUANTIZED = (*NORMS, nn.Embedding, nn.PReLU)


def quantize_model(model: nn.Module, family: Architecture, config: QuantConfig) -> nn.Module:
    """A copy of `model`, in eval mode, with every registered layer and product replaced by its quantized form.

    Parameters are shared with `model` until a layer's integers are set; `model` itself is not changed.
    Nothing is quantized yet: weights are full precision and activation quantizers are off. With time-step
    sets the second input of the network is the time step of each row.

    Raises:
        TypeError: a layer with parameters that the registry does not know, or that has hooks or a `forward` of its own, by name
            and type; a block without a product of the family.
        NotImplementedError: a layer that is known, but not in this form, by name.
    """
    config.validate()
    validate_layers(model, family)
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    wrapped = copy.deepcopy(model, shared).eval()
    splits = family.split_points(model) if config.split else {}
    split_of = {
        id(wrapped.get_submodule(path)): channels for path, channels in splits.items()
    }  # a layer may stand at several paths
    kept = _kept(wrapped, family)
    groups = TimestepGroups(config.time_bounds) if config.time_bounds else None
    if groups is not None:
        wrapped.timestep_groups = groups  # an attribute, so that copies of the network have their own
        wrapped.register_forward_pre_hook(_set_timesteps)

    def quantized(path: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) not in LAYER_TYPES or id(layer) in kept:
            return None
        return _quantized(path, layer, config, split_of.get(id(layer), 0), groups)

    replace_modules(wrapped, quantized)
    for path, module in wrapped.named_modules():
        for name, product in family.products.get(type(module), {}).items() if id(module) not in kept else ():
            if not isinstance(getattr(module, name, None), MatMul):
                raise TypeError(
                    f"{path or 'the network'}: {type(module).__name__} has no product {name} (expected a qdiff.layers.MatMul)"
                )
            setattr(module, name, product.build(config, groups).to(next(model.parameters()).device))
    for path, module in wrapped.named_modules():
        if isinstance(module, ActQuantizer | WeightQuantizer):
            module.name = path
    return wrapped.eval()


def validate_layers(model: nn.Module, family: Architecture) -> None:
    """TypeError, by name, for a module that can be neither quantized nor kept."""
    kept = _kept(model, family)
    for path, module in model.named_modules():
        if id(module) in kept:
            continue
        if type(module) not in LAYER_TYPES:
            own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
            if not all(family.names(name) for name in own):
                raise TypeError(
                    f"{path or 'the network'}: no quantized form registered for {type(module).__name__}, expected it among `keep`"
                )
        elif has_own_behavior(module):
            raise TypeError(
                f"{path or 'the network'}: a hook or a `forward` of its own would be lost; remove it, or name it in `keep`"
            )


def _kept(model: nn.Module, family: Architecture) -> set[int]:
    """The ids of modules whose own parameters stay as they are, by any of their paths."""
    kept: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if family.names(path):
            kept |= {id(inner) for inner in module.modules()}
        elif isinstance(module, UNQUANTIZED):
            kept.add(id(module))
        elif type(module) in family.keep:
            whole = not list(module.parameters(recurse=False))
            kept |= {id(inner) for inner in module.modules()} if whole else {id(module)}
    return kept


def is_inside(path: str, outer: str) -> bool:
    """Whether the module at `path` lies inside the one at `outer` (the network's own path is empty)."""
    return path != outer and (not outer or path.startswith(f"{outer}."))


def has_own_behavior(module: nn.Module) -> bool:
    """Whether a module does something that one in its place would not: hooks, or a `forward` of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _quantized(
    path: str, layer: nn.Module, config: QuantConfig, split: int, groups: TimestepGroups | None
) -> QuantLayer:
    try:
        return LAYER_TYPES[type(layer)](layer, config.weight_bit, config.act_bit, config.a_sym, split, groups)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path or 'the network'}: {error}") from None


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the quantized weights and the parameters of `source`, both wrapped from one network; activations stay as they are."""
    own = {name: tensor for name, tensor in target.state_dict().items() if ".act_quantizer" in f".{name}"}
    target.load_state_dict(source.state_dict() | own, assign=True)
    for layer in quant_layers(target).values():
        layer.freeze()


def _set_timesteps(model: nn.Module, inputs: tuple) -> None:
    """Forward hook: the second input of the network is the time step of each row."""
    model.timestep_groups.set(inputs[1])


def replace_modules(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Put `replacement(path, module)` in the place of every module for which it gives one; it is asked once for each module."""
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
    """The time-step sets that the activation quantizers of `model` share, if it has any."""
    return getattr(model, "timestep_groups", None)


def enable_activations(model: nn.Module, enabled: bool) -> None:
    """Switch every activation quantizer of `model` on or off."""
    for quantizer in act_quantizers(model).values():
        quantizer.enabled = enabled


def init_weights(model: nn.Module, method: str) -> None:
    """Scales by `method` and nearest rounding for every weight: `linear` quantization of the weights."""
    for layer in quant_layers(model).values():
        layer.init_weight_scales(method)


def units(model: nn.Module, family: Architecture) -> list[str]:
    """Reconstruction units by path: each block, each separate layer of a block, every layer outside blocks.

    The order is that of the modules; the calibration puts them in order of execution.

    Raises:
        ConfigError: a block inside another.
    """
    found: list[str] = []
    blocks: list[str] = []
    for path, module in model.named_modules():
        inside = any(is_inside(path, block) for block in blocks)
        if type(module) in family.blocks and any(
            isinstance(inner, QuantLayer | QuantMatMul) for inner in module.modules()
        ):
            if inside:
                outer = next(block for block in blocks if is_inside(path, block))
                where = outer or "the network itself"
                raise ConfigError(
                    f"blocks: {path} ({type(module).__name__}) lies inside {where}: expected blocks apart from one another"
                )
            blocks.append(path)
            found.append(path)
        elif isinstance(module, QuantLayer) and (not inside or family.is_separate(path)):
            found.append(path)
    return found


def unit_modules(unit: nn.Module, family: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """The quantized layers and products that belong to a unit: all inside it but the separate ones."""
    for path, module in unit.named_modules():
        if isinstance(module, QuantLayer | QuantMatMul) and (not path or not family.is_separate(path)):
            yield path, module
