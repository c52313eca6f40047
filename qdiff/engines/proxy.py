"""Modules that stand in for other modules of a network."""

from typing import Any

from torch import Tensor, nn


class ModuleProxy(nn.Module):
    """A module in the place of another one, whose attributes it also has (networks read `in_channels`, `weight`, ...).

    Parameters that are assigned to it become those of the other module, where its forward pass finds them.

    Attributes:
        proxied: the name of the submodule that it stands in for.
    """

    proxied: str

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            setattr(super().__getattr__(self.proxied), name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.proxied:  # it is not assigned yet
                raise
        return getattr(super().__getattr__(self.proxied), name)


class Deferred:
    """The base of tensors whose work is deferred until their values are needed."""

    def values(self) -> Tensor:
        """Do the deferred work; the result is a new tensor."""
        raise NotImplementedError

    def read(self) -> Tensor:
        """The values, which the caller must not change: they are not copied if there is no work to do."""
        raise NotImplementedError


def plain(value: Any, copy: bool = False) -> Any:
    """Replace a deferred tensor, or deferred tensors in nested lists and tuples, by their values."""
    if isinstance(value, Deferred):
        return value.values() if copy else value.read()
    if isinstance(value, list | tuple) and any(isinstance(item, Deferred | list | tuple) for item in value):
        return rebuilt(value, [plain(item, copy) for item in value])
    return value


def rebuilt(old: list | tuple, items: list) -> list | tuple:
    """A list, tuple or named tuple like `old` with other items."""
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def has_engine(model: nn.Module) -> bool:
    """Whether an engine has already replaced modules of `model`."""
    return any(isinstance(module, ModuleProxy) for module in model.modules())
