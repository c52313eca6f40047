"""Modules whose activations are computed again in the backward pass instead of being kept."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from qdiff.layers import QuantMatMul


def attentions(unit: nn.Module) -> list[nn.Module]:
    """The modules inside `unit` that hold attention matmuls; their activations are as large as T x T."""
    return [module for module in unit.modules() if any(isinstance(child, QuantMatMul) for child in module.children())]


@contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Forward passes inside keep the inputs of these modules alone for the backward pass (arXiv 1604.06174).

    The modules must not change between the forward and the backward pass, and have no random part.
    """
    with ExitStack() as stack:
        for module in modules:
            if "forward" in vars(module):  # it is replaced already, by a caller
                continue
            forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            module.forward = forward
            stack.callback(vars(module).pop, "forward")
        yield
