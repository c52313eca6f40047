"""Find what silently stays in full precision in a network that `qdiff.quantize` wrapped, and warn about it.

One forward pass is watched for matmuls of two activations, for layers whose input is a concatenation, and for layers
that were not replaced.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qdiff.layers import LAYER_TYPES, QuantLayer, QuantMatMul

log = logging.getLogger(__name__)

MATMULS = {
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    F.scaled_dot_product_attention,
    Tensor.matmul,
    Tensor.bmm,
    Tensor.baddbmm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}


@dataclass
class Unquantized:
    """What a forward pass does in full precision, although it could be quantized.

    Attributes:
        matmuls: {path of a module: number of its matmuls of two activations}.
        shortcuts: {path of a quantized layer: channels of the first part of its concatenated input}, for layers without
            split.
        layers: the paths of convolutions and linear layers that were not replaced.
    """

    matmuls: Counter[str] = field(default_factory=Counter)
    shortcuts: dict[str, int] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Records matmuls and concatenations, and the module that computes them.

    Args:
        parameters: the ids of the network's parameters; a matmul with a parameter is not one of two activations.
    """

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters = parameters
        self.modules: list[tuple[str, nn.Module]] = []  # the modules whose forward pass is running, innermost last
        # (output, dimension, size of the first part) of every concatenation. The outputs are compared by identity, so
        # they must stay alive: a new tensor could get the id of a freed one.
        self.joined: list[tuple[Tensor, int, int]] = []
        self.found = Unquantized()

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        path, module = self.modules[-1] if self.modules else ("", None)
        if func in MATMULS and not isinstance(module, QuantLayer | QuantMatMul):
            tensors = [part for part in _flat([*args, *kwargs.values()]) if isinstance(part, Tensor)]
            if not any(id(tensor) in self.parameters for tensor in tensors):
                self.found.matmuls[path or "the network"] += 1
        if func in CONCATENATIONS:
            parts = args[0] if args else kwargs["tensors"]
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.dim()
            self.joined.append((output, dim, parts[0].shape[dim]))
        return output

    def enter(self, path: str, module: nn.Module, inputs: Sequence[Any]) -> None:
        """Note that the forward pass of `module` begins."""
        self.modules.append((path, module))
        if isinstance(module, QuantLayer) and not module.split and inputs:
            for joined, dim, first in self.joined:
                if inputs[0] is joined and dim == module.channels % joined.dim():
                    self.found.shortcuts[path] = first


def _flat(values: Sequence[Any]) -> list[Any]:
    """The items of nested lists and tuples."""
    return [item for value in values for item in (_flat(value) if isinstance(value, list | tuple) else [value])]


@torch.no_grad()
def find_unquantized(quantized: nn.Module, run: Callable[[nn.Module], object]) -> Unquantized:
    """Watch one forward pass of a wrapped network.

    Args:
        quantized: the network, wrapped by `qdiff.model`.
        run: runs the network on a batch of any size.
    """
    watch = _Watch({id(parameter) for parameter in quantized.parameters()})
    watch.found.layers = [path for path, module in quantized.named_modules() if type(module) in LAYER_TYPES]
    handles = []
    for path, module in quantized.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda module, args, path=path: watch.enter(path, module, args)),
            module.register_forward_hook(lambda *_: watch.modules.pop() and None, always_call=True),
        ]
    try:
        with watch:
            run(quantized)
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


def log_unquantized(found: Unquantized, activations: bool) -> None:
    """Log one warning for each kind of operation that stays in full precision.

    Args:
        found: what the forward pass did.
        activations: whether activations are quantized; if not, matmuls of activations are not mentioned.
    """
    if activations and found.matmuls:
        places = ", ".join(f"{path} ({count})" if count > 1 else path for path, count in found.matmuls.items())
        total = sum(found.matmuls.values())
        log.warning(
            "%d attention matmuls stay in full precision "
            "(as MatMul modules they can be named in attention_matmuls): %s",
            total,
            places,
        )
    if found.shortcuts:
        places = ", ".join(f"{path}: {first}" for path, first in found.shortcuts.items())
        log.warning(
            "%d layers see a concatenation through one quantizer (splits would give them two): %s",
            len(found.shortcuts),
            places,
        )
    if found.layers:
        log.warning("%d layers stay in full precision (keep): %s", len(found.layers), ", ".join(found.layers))
