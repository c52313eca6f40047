"""Modules in the place of others."""

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """A module in the place of another one; what it lacks (`in_channels`, `weight`, ...: networks read them) is that one's.

    stands_for: the name under which it holds the other module.
    """

    stands_for: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.stands_for:  # not there yet
                raise
        return getattr(super().__getattr__(self.stands_for), name)
