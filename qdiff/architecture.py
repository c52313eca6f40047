"""What quantization must know of a family of networks: its `Architecture`, and how one is found by the family's name.

A family is registered by a line that names a module-level `Architecture`: here for those of this project, under the
entry point group `qdiff.families` for those of other packages. Its module is imported when the family is first asked
for.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from qdiff.attention import AttentionCall
from qdiff.config import QuantConfig
from qdiff.errors import ConfigError
from qdiff.layers import ActQuantizer, QuantMatMul, TimestepGroups
from qdiff.policy import widths_of

log = logging.getLogger(__name__)

ENTRY_POINTS = "qdiff.families"
CUSTOM = "custom"  # the family of networks that `qdiff.quantize` was given


@dataclass(frozen=True)
class AttentionMatMulSpec:
    """One attention matmul of a block.

    Attributes:
        operands: the names of both factors, in order. They name the quantizers (`act_quantizer_q`).
        softmax: the name of the factor that holds attention probabilities, quantized to `sm_abit` bits; None: neither
            does.
        always_zero: the zero point of the probabilities is forced to 0.
        follows_a_sym: the probabilities are signed when activations are symmetric.
        on_block: published files name the quantizers on the block, not on the matmul inside it.
    """

    operands: tuple[str, str]
    softmax: str | None = None
    always_zero: bool = False
    follows_a_sym: bool = True
    on_block: bool = False

    @classmethod
    def of_call(cls, probabilities: int | None) -> "AttentionMatMulSpec":
        """The spec of a matmul that was found in a function call.

        Args:
            probabilities: the operand that holds attention probabilities: 0, 1, or None.
        """
        if probabilities is None:
            return cls(("q", "k"))
        operands = ("w", "v") if probabilities == 0 else ("v", "w")
        return cls(operands, softmax="w", always_zero=True, follows_a_sym=False)

    def make(self, config: QuantConfig, groups: TimestepGroups | None, path: str = "") -> QuantMatMul:
        """The quantized matmul in the number formats of `config`.

        Args:
            config: the number formats.
            groups: the timestep groups.
            path: its path, by which the policy of `config` finds its width: that of both operands.
        """
        _, own = widths_of(config.policy, path)
        formats = config if own is None else replace(config, act_bit=own, sm_abit=own)
        return QuantMatMul({name: self._quantizer(name, formats, groups) for name in self.operands})

    def _quantizer(self, name: str, config: QuantConfig, groups: TimestepGroups | None) -> ActQuantizer:
        if name != self.softmax:
            return ActQuantizer(config.act_bit, config.a_sym, groups=groups)
        symmetric = config.a_sym and self.follows_a_sym
        return ActQuantizer(config.sm_abit, symmetric, self.always_zero, is_softmax=True, groups=groups)


def _no_splits(_: nn.Module) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """What quantization must know of a family of networks.

    Attributes:
        name: the family's name, as packed checkpoints store it.
        make_unet: makes the network from the configuration that a packed checkpoint stores.
        blocks: the module types that are reconstructed as a whole. Each names the layer inside whose bias is added to
            the block's output; None switches the bias correction of this block off.
        block_paths: single modules that are reconstructed as a whole, by path, with the layer of `blocks`.
        separate: how the paths of layers inside blocks end that are reconstructed on their own, before their block
            (projections of the time embedding: TFMQ-DM, arXiv 2311.16503).
        attention_matmuls: for each block type its attention matmuls by attribute name.
        calls: for each module, by path, the function calls that multiply activations in its forward pass, in order
            (`qdiff.structure`).
        split_points: from a network to {path of a layer: input channels of the first half of its concatenated input}.
        keep: what stays in full precision. The path of a module, a pattern (`head.*`), a type of modules or its name
            (`MultiheadAttention`) keeps everything inside; the path of a parameter keeps the parameter.
        unused: the paths of layers that never run, and of parameters that no product uses; they stay in full precision.
        signatures: parts of tensor names by which a state dict of this family is recognized in messages.
        input_layer: the path of the layer that x_t goes into.
    """

    name: str
    make_unet: Callable[[dict[str, Any]], nn.Module]
    blocks: Mapping[type[nn.Module], str | None]
    block_paths: Mapping[str, str | None] = field(default_factory=dict)
    separate: tuple[str, ...] = ()
    attention_matmuls: Mapping[type[nn.Module], Mapping[str, AttentionMatMulSpec]] = field(default_factory=dict)
    calls: Mapping[str, tuple[AttentionCall, ...]] = field(default_factory=dict)
    split_points: Callable[[nn.Module], Mapping[str, int]] = _no_splits
    keep: tuple[type[nn.Module] | str, ...] = ()
    unused: frozenset[str] = frozenset()
    signatures: tuple[str, ...] = ()
    input_layer: str = ""

    def keeps(self, path: str) -> bool:
        """Whether a name or pattern of `keep` matches the path of a module or parameter, or it is unused."""
        return path in self.unused or any(isinstance(kept, str) and fnmatchcase(path, kept) for kept in self.keep)

    def keeps_type(self, kind: type[nn.Module]) -> bool:
        """Whether `keep` has a type of modules or its name."""
        return kind in self.keep or kind.__name__ in self.keep

    def is_block(self, path: str, module: nn.Module) -> bool:
        """Whether the module at `path` is reconstructed as a whole."""
        return path in self.block_paths or type(module) in self.blocks

    def output_layer(self, path: str, unit: nn.Module) -> nn.Module | None:
        """The layer whose bias is added to the output of the unit at `path`: the unit itself if it is a layer."""
        if not self.is_block(path, unit):
            return unit
        layer = self.block_paths[path] if path in self.block_paths else self.blocks[type(unit)]
        return None if layer is None else unit.get_submodule(layer)

    def is_separate(self, path: str) -> bool:
        """Whether the layer at `path` is reconstructed apart from the block it is in."""
        return any(f".{path}".endswith(f".{name}") for name in self.separate)


# The one list of this project's families: name, and where its `Architecture` is.
_FAMILIES: dict[str, str | Architecture] = {"pixel": "ddim.family:PIXEL", "latent": "ldm.family:LATENT"}


def register_family(name: str, place: str | Architecture) -> None:
    """Make a family known to this process; packages use the entry point group `qdiff.families` instead.

    Args:
        name: the family's name, as packed checkpoints store it.
        place: its `Architecture`, or where that is found on first use: `module:attribute`.

    Raises:
        ConfigError: the name is taken.
    """
    if name in (*family_names(), CUSTOM):
        raise ConfigError(f" {name!r}: this name is taken", field="family")
    _FAMILIES[name] = place


def family_names() -> list[str]:
    """The names of all families, including those of installed packages."""
    return sorted({*_FAMILIES, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def find_architecture(name: str) -> Architecture:
    """The architecture of a family. Its module is imported now, unless it was imported before.

    Raises:
        ConfigError: no family has this name, or its architecture cannot be imported.
    """
    if name not in family_names():
        raise ConfigError(f" {name!r}: expected one of {', '.join(family_names())}", field="family")
    place = _FAMILIES.get(name)
    if isinstance(place, Architecture):
        return place
    try:
        if place is None:
            (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
            found = point.load()
        else:
            module, _, attribute = place.partition(":")
            found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f" {name!r}: its architecture cannot be imported ({error})", field="family") from error
    if not isinstance(found, Architecture) or found.name != name:
        raise ConfigError(f" {name!r}: expected an Architecture of this name, found {found!r}", field="family")
    _FAMILIES[name] = found
    return found


def architectures() -> Iterator[Architecture]:
    """The architectures of all families that can be imported."""
    for name in family_names():
        try:
            yield find_architecture(name)
        except ConfigError as error:
            log.warning("%s", error)
