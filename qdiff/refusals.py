"""What stays in full precision without being named, and what cannot be quantized: all of it at once, with a way out.

Layers of registered types are quantized. Parameters of other modules stay in full precision if they are vectors (norms,
gains, LayerScale) or if no product uses them (position embeddings, learned tokens). What remains is refused.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from qdiff.architecture import Architecture
from qdiff.layers import LAYER_TYPES, has_own_behavior

log = logging.getLogger(__name__)

NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
UNQUANTIZED = (*NORMS, nn.Embedding, nn.EmbeddingBag, nn.PReLU)

# Products by the names of their functions and methods. The first argument of those in MAPS is their input.
MAPS = {"linear", "bilinear", *(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3))}
MATMULS = {"matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "einsum", "tensordot", "inner"}
LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # only the first argument gives values
PRODUCTS = {*MAPS, *MATMULS, "__matmul__", "__rmatmul__", "multi_head_attention_forward"}


@dataclass(frozen=True)
class Refusal:
    """A module that can be neither quantized nor left in full precision without being named.

    Attributes:
        path: its path; empty for the network itself.
        message: what is in the way, with its type.
        keep: the names that keep it, or its parameters, in full precision.
        words: names that keep all modules of its type; empty: there are none.
    """

    path: str
    message: str
    keep: tuple[str, ...]
    words: tuple[str, ...] = ()


def kept_ids(model: nn.Module, architecture: Architecture) -> set[int]:
    """The ids of modules that stay in full precision. It is enough that one of a module's paths is kept."""
    ids: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if architecture.keeps(path) or architecture.keeps_type(type(module)):
            ids |= {id(inner) for inner in module.modules()}
        elif isinstance(module, UNQUANTIZED):
            ids.add(id(module))
    return ids


def validate_layers(model: nn.Module, architecture: Architecture) -> None:
    """Check that every module of `model` can be quantized or left in full precision.

    Raises:
        TypeError: there are modules for which neither is possible. The message has one line for each, with its path,
            its type and a way out.
    """
    if not (found := find_refusals(model, architecture)):
        return
    kept = [name if isinstance(name, str) else name.__name__ for name in architecture.keep]
    names = dict.fromkeys([*kept, *(name for one in found for name in (one.words or map(escape, one.keep)))])
    count = "1 module" if len(found) == 1 else f"{len(found)} modules"
    lines = [f"  {one.path or 'the network'}: {one.message}; {_paste(map(escape, one.keep))}" for one in found]
    head = f"{count} can be neither quantized nor left in full precision unnamed; {_paste(names)} names all of them:"
    raise TypeError("\n".join([head, *lines]))


def _paste(names: Iterable[str]) -> str:
    """The argument `keep` with these names, as Python reads it."""
    quoted = ", ".join('"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"' for name in names)
    return f"keep=[{quoted}]"


def find_refusals(model: nn.Module, architecture: Architecture) -> list[Refusal]:
    """The modules of `model` that can be neither quantized nor left in full precision, in order of their paths."""
    kept = kept_ids(model, architecture)
    found: list[Refusal] = []
    for path, module in model.named_modules():
        if id(module) in kept:
            continue
        if (refusal := _refusal(path, module, architecture)) is not None:
            found.append(refusal)
            if refusal.keep == (path,):
                kept |= {id(inner) for inner in module.modules()}
    return found


def _refusal(path: str, module: nn.Module, architecture: Architecture) -> Refusal | None:
    """Why a module that is not kept cannot be quantized; None if it can, or has nothing to quantize."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        way = "torch.nn.utils.parametrize.remove_parametrizations undoes it"
        return Refusal(path, f"{kind} has a parametrization ({way})", (path,))
    if type(module) in LAYER_TYPES:
        if has_own_behavior(module):
            return Refusal(
                path, f"{kind} has a hook or a `forward` of its own, which would be lost (remove it)", (path,)
            )
        return None
    matrices = {name: matrix for name, matrix in _matrices(path, module).items() if not architecture.keeps(name)}
    if not matrices:
        return None
    if _is_of_torch(module):
        return Refusal(path, f"{kind} has no quantized form", (path,), (kind,))
    own = ", ".join(f"{name.rpartition('.')[2]} {list(matrix.shape)}" for name, matrix in matrices.items())
    return Refusal(path, f"{kind} has no quantized form for its {own}", tuple(matrices))


def _is_of_torch(module: nn.Module) -> bool:
    """Whether PyTorch defines what a module does with its parameters."""
    return type(module).__module__.startswith("torch.") and type(module) not in CONTAINERS


def _matrices(path: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters with more than one dimension of a size other than 1, by name."""
    parameters = module.named_parameters(prefix=path, recurse=False)
    return {name: parameter for name, parameter in parameters if sum(size != 1 for size in parameter.shape) > 1}


# --- what a forward pass tells -------------------------------------------------------------------------


class _Products(TorchFunctionMode):
    """Records which parameters are factors of products, also if they are transposed or normalized before.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Tensors that are computed from parameters and buffers alone, by their ids, with the names of the parameters.
        # They must stay alive: a new tensor could get the id of a freed one.
        self.sources: dict[int, tuple[Tensor, frozenset[str]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.sources[id(parameter)] = parameter, self._names(parameter) | {name}
        for buffer in model.buffers():
            self.sources[id(buffer)] = buffer, frozenset()
        self.factors: set[str] = set()

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name, tensors = getattr(func, "__name__", ""), list(_tensors([*args, *kwargs.values()]))
        if name in PRODUCTS:
            for tensor in tensors[1 if name in MAPS else 0 :]:
                self.factors |= self._names(tensor)
        used = tensors[:1] if name in LIKE else tensors
        if used and all(id(tensor) in self.sources for tensor in used):
            names = frozenset().union(*(self._names(tensor) for tensor in used))
            for tensor in _tensors([output]):
                self.sources.setdefault(id(tensor), (tensor, names))
        elif tensors and _is_in_place(name):
            self.sources.pop(id(tensors[0]), None)  # an activation went into it
        return output

    def _names(self, tensor: Tensor) -> frozenset[str]:
        return self.sources[id(tensor)][1] if id(tensor) in self.sources else frozenset()


def _is_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@torch.no_grad()
def keep_unused(
    model: nn.Module, architecture: Architecture, ran: Collection[str], run: Callable[[], object]
) -> Architecture:
    """Keep what a forward pass does not multiply by: layers that never run, and parameters that are no factors.

    Args:
        model: the full-precision network, in eval mode.
        architecture: its architecture.
        ran: the paths of the layers that run.
        run: runs the network on some samples.

    Returns:
        The architecture that keeps these layers and parameters too.
    """
    kept = kept_ids(model, architecture)
    modules = {path: module for path, module in model.named_modules() if id(module) not in kept}
    layers = [path for path, module in modules.items() if type(module) in LAYER_TYPES]
    idle = [path for path in layers if path not in ran]
    if idle:
        log.warning("%d layers never run and stay in full precision: %s", len(idle), ", ".join(idle))
    own = {path: module for path, module in modules.items() if path not in layers and not _is_of_torch(module)}
    matrices = {name for path, module in own.items() for name in _matrices(path, module)}
    if matrices:
        with _Products(model) as products:
            run()
        matrices -= products.factors
    return replace(architecture, unused=frozenset([*idle, *matrices]))


def log_own_parameters(model: nn.Module, architecture: Architecture) -> None:
    """Log which modules other than PyTorch's have parameters that stay in full precision, by type."""
    kept, counts = kept_ids(model, architecture), Counter[str]()
    for module in model.modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if names and id(module) not in kept and type(module) not in LAYER_TYPES:
            counts[f"{type(module).__name__} ({', '.join(names)})"] += 1
    if counts:
        found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        log.info("modules whose own parameters stay in full precision: %s", found)
