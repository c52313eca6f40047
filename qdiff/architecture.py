"""What quantization must know of a family of networks: its `Architecture`, and how one is found by the family's name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from qdiff.config import QuantConfig
from qdiff.layers import ActQuantizer, QuantMatMul, TimestepGroups


@dataclass(frozen=True)
class AttentionMatMulSpec:
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

    def build(self, config: QuantConfig, groups: TimestepGroups | None) -> QuantMatMul:
        return QuantMatMul({name: self._quantizer(name, config, groups) for name in self.operands})

    def _quantizer(self, name: str, config: QuantConfig, groups: TimestepGroups | None) -> ActQuantizer:
        if name != self.softmax:
            return ActQuantizer(config.act_bit, config.a_sym, groups=groups)
        symmetric = config.a_sym and self.follows_a_sym
        return ActQuantizer(config.sm_abit, symmetric, self.always_zero, is_softmax=True, groups=groups)


@dataclass(frozen=True)
class Architecture:
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
    products: dict[type[nn.Module], dict[str, AttentionMatMulSpec]] = field(default_factory=dict)
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


FAMILIES: dict[str, Architecture] = {}


def register_family(family: Architecture) -> Architecture:
    FAMILIES[family.name] = family
    return family
