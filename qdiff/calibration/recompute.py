"""Modules whose activations are computed again in the backward pass instead of being kept."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Forward passes inside keep the inputs of these modules alone for the backward pass (arXiv 1604.06174).

    The modules must not change between the forward and the backward pass, and have no random part. One inside another
    is computed again with it.
    """
    modules = list(modules)
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    with ExitStack() as stack:
        for module in modules:
            if id(module) in inner or "forward" in vars(module):  # the latter is replaced already, by a caller
                continue
            forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            module.forward = forward
            stack.callback(vars(module).pop, "forward")
        yield
