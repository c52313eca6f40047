"""What of a foreign network stays in full precision without anybody having said so: found in one forward pass, told in the log."""

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

PRODUCTS = {
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
    """products: how many products of two activations each module makes. shortcuts: layers whose input is a concatenation that is not
    split, with the channels of its first part. layers: convolutions and linear layers that were kept."""

    products: Counter[str] = field(default_factory=Counter)
    shortcuts: dict[str, int] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Sees products and concatenations, and in which module they are made."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters = parameters
        self.modules: list[tuple[str, nn.Module]] = []
        self.joined: list[tuple[Tensor, int, int]] = []  # held, so that they can be told apart by identity
        self.found = Unquantized()

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        path, module = self.modules[-1] if self.modules else ("", None)
        if func in PRODUCTS and not isinstance(module, QuantLayer | QuantMatMul):
            tensors = [part for part in _flat([*args, *kwargs.values()]) if isinstance(part, Tensor)]
            if not any(id(tensor) in self.parameters for tensor in tensors):
                self.found.products[path or "the network"] += 1
        if func in CONCATENATIONS:
            parts = args[0] if args else kwargs["tensors"]
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.dim()
            self.joined.append((output, dim, parts[0].shape[dim]))
        return output

    def enter(self, path: str, module: nn.Module, inputs: Sequence[Any]) -> None:
        self.modules.append((path, module))
        if isinstance(module, QuantLayer) and not module.split and inputs:
            for joined, dim, first in self.joined:
                if inputs[0] is joined and dim == module.channels % joined.dim():
                    self.found.shortcuts[path] = first


def _flat(values: Sequence[Any]) -> list[Any]:
    return [item for value in values for item in (_flat(value) if isinstance(value, list | tuple) else [value])]


@torch.no_grad()
def find_unquantized(quantized: nn.Module, inputs: Sequence[Tensor]) -> Unquantized:
    """What one forward pass of a network that was wrapped (`qdiff.model.quantize_model`) does in full precision."""
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
            quantized(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


def log_unquantized(found: Unquantized, activations: bool) -> None:
    """One line in the log for each kind of thing that stays in full precision; products count where activations are quantized."""
    if activations and found.products:
        places = ", ".join(f"{path} ({count})" if count > 1 else path for path, count in found.products.items())
        total = sum(found.products.values())
        log.warning(
            "%d attention products stay in full precision (as MatMul modules they can be named in products): %s",
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
