"""Modules in the place of others."""

from typing import Any

from torch import nn


class ModuleProxy(nn.Module):
    """A module in the place of another one; what it lacks (`in_channels`, `weight`, ...: networks read them) is that one's.

    stands_for: the name under which it holds the other module.
    """

    proxied: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.proxied:  # not there yet
                raise
        return getattr(super().__getattr__(self.proxied), name)


def has_engine(model: nn.Module) -> bool:
    """Whether an engine has already put its modules into `model`."""
    return any(isinstance(module, ModuleProxy) for module in model.modules())
