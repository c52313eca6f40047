"""Wrapping: a full-precision network becomes a quantized one, guided by what its family registered."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from qdiff.config import ConfigError, QuantConfig
from qdiff.layers import LAYER_TYPES, ActQuantizer, MatMul, QuantLayer, QuantMatMul, TimeSteps, WeightQuantizer

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
UNQUANTIZED = (*NORMS, nn.Embedding, nn.PReLU)


@dataclass(frozen=True)
class Product:
    """One attention product of a block.

    operands: names of the two factors in order (they name the quantizers). softmax: which of them, if
    any, holds attention probabilities (width `sm_abit`). always_zero: their zero point is forced to 0.
    follows_a_sym: they are signed when activations are. on_block: published files name the quantizers
    on the block, not on the product.
    """

    operands: tuple[str, str]
    softmax: str | None = None
    always_zero: bool = False
    follows_a_sym: bool = True
    on_block: bool = False

    def build(self, config: QuantConfig, steps: TimeSteps | None) -> QuantMatMul:
        return QuantMatMul({name: self._quantizer(name, config, steps) for name in self.operands})

    def _quantizer(self, name: str, config: QuantConfig, steps: TimeSteps | None) -> ActQuantizer:
        if name != self.softmax:
            return ActQuantizer(config.act_bit, config.a_sym, steps=steps)
        symmetric = config.a_sym and self.follows_a_sym
        return ActQuantizer(config.sm_abit, symmetric, self.always_zero, is_softmax=True, steps=steps)


@dataclass(frozen=True)
class Family:
    """What quantization must know of a family of networks.

    build: from the configuration stored in a packed file to the network. blocks: module types that are
    reconstructed as a whole, each with the layer inside whose bias is added to its output (None: no bias
    correction of this block). separate:
    how the paths of those layers inside blocks end that are reconstructed on their own, before the
    block (time embeddings: TFMQ-DM, arXiv 2311.16503). products: for each block type, its attention
    products by attribute name. split_points: from a network to {layer: channels of the first half}.
    keep: what stays in full precision. A path of a module, or a pattern of paths (`head.*`), keeps everything inside it; that of a
    parameter keeps the parameter. A type keeps the modules' own parameters, or everything inside where they have none of their own.
    signature: a key by which a state dict of this family is recognized. input_layer: the path of the layer that x_t goes into.
    """

    name: str
    build: Callable[[dict], nn.Module]
    blocks: dict[type[nn.Module], str | None]
    separate: tuple[str, ...] = ()
    products: dict[type[nn.Module], dict[str, Product]] = field(default_factory=dict)
    split_points: Callable[[nn.Module], dict[str, int]] = lambda _: {}
    keep: tuple[type[nn.Module] | str, ...] = ()
    signature: str = ""
    input_layer: str = ""

    def names(self, path: str) -> bool:
        """Whether a name or pattern of `keep` matches the path of a module or parameter."""
        return any(isinstance(kept, str) and fnmatchcase(path, kept) for kept in self.keep)

    def output_layer(self, unit: nn.Module) -> nn.Module | None:
        """The layer whose bias is added to the output of `unit`: the unit itself where it is a layer."""
        if type(unit) not in self.blocks:
            return unit
        path = self.blocks[type(unit)]
        return None if path is None else unit.get_submodule(path)

    def is_separate(self, path: str) -> bool:
        """Whether the layer at `path` is reconstructed apart from the block it is in."""
        return any(f".{path}".endswith(f".{name}") for name in self.separate)


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    FAMILIES[family.name] = family
    return family


def quantize_model(model: nn.Module, family: Family, config: QuantConfig) -> nn.Module:
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
    check_layers(model, family)
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    wrapped = copy.deepcopy(model, shared).eval()
    splits = family.split_points(model) if config.split else {}
    split_of = {id(wrapped.get_submodule(path)): channels for path, channels in splits.items()}  # a layer may stand at several paths
    kept = _kept(wrapped, family)
    steps = TimeSteps(config.time_bounds) if config.time_bounds else None
    if steps is not None:
        wrapped.time_step_sets = steps  # an attribute, so that copies of the network have their own
        wrapped.register_forward_pre_hook(_tell_time)

    def quantized(path: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) not in LAYER_TYPES or id(layer) in kept:
            return None
        return _quantized(path, layer, config, split_of.get(id(layer), 0), steps)

    replace_modules(wrapped, quantized)
    for path, module in wrapped.named_modules():
        for name, product in family.products.get(type(module), {}).items() if id(module) not in kept else ():
            if not isinstance(getattr(module, name, None), MatMul):
                raise TypeError(f"{path or 'the network'}: {type(module).__name__} has no product {name} (expected a qdiff.layers.MatMul)")
            setattr(module, name, product.build(config, steps).to(next(model.parameters()).device))
    for path, module in wrapped.named_modules():
        if isinstance(module, ActQuantizer | WeightQuantizer):
            module.name = path
    return wrapped.eval()


def check_layers(model: nn.Module, family: Family) -> None:
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
            raise TypeError(f"{path or 'the network'}: a hook or a `forward` of its own would be lost; remove it, or name it in `keep`")


def _kept(model: nn.Module, family: Family) -> set[int]:
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


def _quantized(path: str, layer: nn.Module, config: QuantConfig, split: int, steps: TimeSteps | None) -> QuantLayer:
    try:
        return LAYER_TYPES[type(layer)](layer, config.weight_bit, config.act_bit, config.a_sym, split, steps)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path or 'the network'}: {error}") from None


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the quantized weights and the parameters of `source`, both wrapped from one network; activations stay as they are."""
    own = {name: tensor for name, tensor in target.state_dict().items() if ".act_quantizer" in f".{name}"}
    target.load_state_dict(source.state_dict() | own, assign=True)
    for layer in quant_layers(target).values():
        layer.freeze()


def _tell_time(model: nn.Module, inputs: tuple) -> None:
    """Forward hook: the second input of the network is the time step of each row."""
    model.time_step_sets.set(inputs[1])


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


def time_steps(model: nn.Module) -> TimeSteps | None:
    """The time-step sets that the activation quantizers of `model` share, if it has any."""
    return getattr(model, "time_step_sets", None)


def enable_activations(model: nn.Module, enabled: bool) -> None:
    """Switch every activation quantizer of `model` on or off."""
    for quantizer in act_quantizers(model).values():
        quantizer.enabled = enabled


def init_weights(model: nn.Module, method: str) -> None:
    """Scales by `method` and nearest rounding for every weight: `linear` quantization of the weights."""
    for layer in quant_layers(model).values():
        layer.init_weight_scales(method)


def units(model: nn.Module, family: Family) -> list[str]:
    """Reconstruction units by path: each block, each separate layer of a block, every layer outside blocks.

    The order is that of the modules; the calibration puts them in order of execution.

    Raises:
        ConfigError: a block inside another.
    """
    found: list[str] = []
    blocks: list[str] = []
    for path, module in model.named_modules():
        inside = any(is_inside(path, block) for block in blocks)
        if type(module) in family.blocks and any(isinstance(inner, QuantLayer | QuantMatMul) for inner in module.modules()):
            if inside:
                outer = next(block for block in blocks if is_inside(path, block))
                where = outer or "the network itself"
                raise ConfigError(f"blocks: {path} ({type(module).__name__}) lies inside {where}: expected blocks apart from one another")
            blocks.append(path)
            found.append(path)
        elif isinstance(module, QuantLayer) and (not inside or family.is_separate(path)):
            found.append(path)
    return found


def unit_modules(unit: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """The quantized layers and products that belong to a unit: all inside it but the separate ones."""
    for path, module in unit.named_modules():
        if isinstance(module, QuantLayer | QuantMatMul) and (not path or not family.is_separate(path)):
            yield path, module
