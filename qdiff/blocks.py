"""Blocks of a network that knows nothing of this package: residual blocks and transformer blocks, by structure."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qdiff.model import is_inside
from qdiff.structure import CONTAINERS, Structure

MAX_LAYERS = 16  # of a block: a transformer block with two attentions has 10 layers, a residual block 2 to 5


def find_blocks(model: nn.Module, structure: Structure, layers: Collection[str]) -> list[str]:
    """The paths of the modules that are to be reconstructed as a whole, in the order of the modules.

    They are the largest modules of 2 to MAX_LAYERS layers that take and return tensors and are no stages. A stage holds
    a list of several such modules, or a list of one and returns several tensors. Whether a block can be a
    reconstruction unit is found later (`trace_execution`).

    Args:
        model: the full-precision network.
        structure: what a forward pass of it showed.
        layers: the paths of the layers that are quantized.
    """
    return _Search(model, structure, layers).blocks("")


class _Search:
    """The search for blocks, from the network down.

    Args:
        model: the full-precision network.
        structure: what a forward pass of it showed.
        layers: the paths of the layers that are quantized.
    """

    def __init__(self, model: nn.Module, structure: Structure, layers: Collection[str]) -> None:
        self.modules = dict(model.named_modules())
        self.candidates, self.layers = structure.modules, set(layers)
        self.children: dict[str, list[str]] = {path: [] for path in self.modules}
        for path in self.modules:
            if path:
                self.children[path.rpartition(".")[0]].append(path)

    def blocks(self, path: str) -> list[str]:
        """The blocks in a module, which may be one itself."""
        if self._is_block(path):
            return [path]
        return [block for child in self.children[path] for block in self.blocks(child)]

    def _inside(self, path: str) -> set[str]:
        return {layer for layer in self.layers if is_inside(layer, path)}

    def _is_block(self, path: str) -> bool:
        layers = self._inside(path)
        if not 2 <= len(layers) <= MAX_LAYERS or layers == self.layers or path not in self.candidates:
            return False
        return not isinstance(self.modules[path], CONTAINERS) and not self._is_stage(path)

    def _is_stage(self, path: str) -> bool:
        """Whether a list inside the module holds modules that could be blocks."""
        lists = [inner for inner, module in self.modules.items() if isinstance(module, CONTAINERS)]
        counts = [
            sum(child in self.candidates and len(self._inside(child)) > 1 for child in self.children[inner])
            for inner in lists
            if is_inside(inner, path)
        ]
        returns_one = self.candidates[path]
        return max(counts, default=0) > (1 if returns_one else 0)


@torch.no_grad()
def find_output_layers(
    model: nn.Module, run: Callable[[], Any], blocks: Collection[str], layers: Collection[str]
) -> Mapping[str, str | None]:
    """For each block the layer inside whose bias is added to the output of the block, if its last layer is one.

    The bias is moved to see whether the output moves with it, channel by channel.

    Args:
        model: the full-precision network.
        run: runs it on a few samples.
        blocks: the paths of the blocks.
        layers: the paths of the layers that are quantized, in the order in which they run.
    """
    found: dict[str, str | None] = dict.fromkeys(blocks)
    handles: dict[str, RemovableHandle] = {}

    def watch(block: str) -> None:
        module = model.get_submodule(block)
        last = [layer for layer in layers if is_inside(layer, block)][-1].removeprefix(f"{block}.")

        def look(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            handles[block].remove()  # so that the block can run again
            if isinstance(output, Tensor) and _adds_bias(
                module.get_submodule(last), lambda: module(*args, **kwargs), output
            ):
                found[block] = last

        handles[block] = module.register_forward_hook(look, with_kwargs=True)

    for block in blocks:
        watch(block)
    try:
        run()
    finally:
        for handle in handles.values():
            handle.remove()
    return found


def _adds_bias(layer: nn.Module, run: Callable[[], Tensor], output: Tensor) -> bool:
    """Whether the bias of `layer` is added to an output: along dimension 1, or the last one for linear layers."""
    dim = -1 if isinstance(layer, nn.Linear) else 1
    bias = layer.bias
    if not isinstance(bias, Tensor) or output.dim() < 2 or output.shape[dim] != len(bias):
        return False
    size = output.float().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    shift = (size * torch.linspace(0.5, 1.5, len(bias), device=bias.device)).to(bias.dtype)
    kept = bias.clone()
    bias.add_(shift)
    moved = run() - output
    bias.copy_(kept)
    expected = shift.view([-1 if i == dim % output.dim() else 1 for i in range(output.dim())]).expand_as(output)
    error = torch.linalg.vector_norm((moved - expected).float())
    return bool(error <= 0.05 * torch.linalg.vector_norm(expected.float()))
