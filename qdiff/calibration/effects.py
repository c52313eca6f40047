"""What changes inside a network do to its output, estimated for all of its modules at once.

A module whose output changes by d changes the output of the network by J d, to first order, with the Jacobian J. For a
vector v of random signs, (v J d)^2 has the mean ||J d||^2 (Hutchinson 1990), and one backward pass gives v J at every
module. So the cost does not depend on the number of modules.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Changes = Callable[[str, tuple[Any, ...], dict[str, Any], Tensor], Sequence[Tensor]]


def squared_effects(
    network: nn.Module,
    paths: Sequence[str],
    changes: Changes,
    run: Callable[[Tensor], Tensor],
    samples: Tensor,
    vectors: int,
    on_sample: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Estimate how far changes of the outputs of modules, each alone, move the output of the network.

    Samples pass one by one, so that every value inside the network belongs to one sample. For each of them there are
    one forward pass and `vectors` backward passes.

    Args:
        network: the network.
        paths: the modules whose outputs are changed.
        changes: from (path, arguments, keyword arguments, output) of a call of a module to the changes of its output
            that are judged, of the output's shape or a scalar. A module always gives equally many. They are kept in
            bfloat16.
        run: runs the network on some samples.
        samples: numbers of samples, [S].
        vectors: random directions of the output for each sample.
        on_sample: is called after every sample.

    Returns:
        {path: the mean of ||J d||^2 / ||y||^2 over the samples, for each of its changes}, in order of execution.
        Changes in several calls count together. It is empty if no module leaves a gradient in the network.
    """
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, list[float]] = {}
    for index in samples:
        with torch.enable_grad(), _Watch(network, paths, changes) as watch:
            output = run(index[None])
        norm = output.detach().float().norm().clamp(min=torch.finfo(torch.float32).tiny).item()
        for number in range(vectors if output.requires_grad else 0):
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            for path, moved in watch.moved(output, signs, keep=number + 1 < vectors).items():
                total = sums.setdefault(path, [0.0] * len(moved))
                sums[path] = [old + (new / norm) ** 2 for old, new in zip(total, moved, strict=True)]
        on_sample()
    return {path: [total / len(samples) / vectors for total in totals] for path, totals in sums.items()}


class _Watch:
    """Inside a `with` it collects the changes of the outputs of modules in a pass of the network."""

    def __init__(self, network: nn.Module, paths: Sequence[str], changes: Changes) -> None:
        self.network, self.paths, self.changes = network, paths, changes
        self.calls: list[tuple[str, GradientEdge, Sequence[Tensor]]] = []  # (path, where its gradient is, its changes)

    def __enter__(self) -> "_Watch":
        self.handles = [
            self.network.get_submodule(path).register_forward_hook(partial(self._visit, path), with_kwargs=True)
            for path in self.paths
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _visit(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        with torch.no_grad():
            changes = [change.to(torch.bfloat16) for change in self.changes(path, args, kwargs, output)]
        output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        if output.requires_grad:  # the edge is taken before anything changes the output in place
            self.calls.append((path, get_gradient_edge(output), changes))
        return output

    def moved(self, output: Tensor, direction: Tensor, keep: bool) -> dict[str, list[float]]:
        """How far the changes move the output of the pass in a direction of the same shape, to first order."""
        edges = [edge for _, edge, _ in self.calls]
        gradients = torch.autograd.grad(output, edges, direction, retain_graph=keep, allow_unused=True)
        found: dict[str, list[float]] = {}
        for (path, _, changes), gradient in zip(self.calls, gradients, strict=True):
            if gradient is None:  # the output does not depend on it
                moved = [0.0] * len(changes)
            else:
                moved = [(gradient.float() * change.float()).sum().item() for change in changes]
            found[path] = [old + new for old, new in zip(found.get(path, [0.0] * len(moved)), moved, strict=True)]
        return found
