"""Values that are not finite numbers: found in weights before work, and in sampling at the step where they first appear."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qdiff.errors import NonFiniteError


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, if there is one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


class FiniteSteps:
    """Remembers for each evaluation of a network whether its output was finite, on its device: nothing waits for it in a step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def add(self, t: Tensor, output: Tensor) -> None:
        """An evaluation at time steps `t` [N]."""
        self.steps.append((t[0], torch.isfinite(output).all()))

    def check(self, network: str) -> None:
        """Read what was remembered, once.

        Raises:
            NonFiniteError: names `network` and the first step whose output was not finite.
        """
        if not self.steps or bool(torch.stack([finite for _, finite in self.steps]).all()):
            return
        number, t = next((i, t.item()) for i, (t, finite) in enumerate(self.steps) if not finite)
        raise NonFiniteError(
            f"{network}: values that are not finite numbers, first at step {number + 1} of {len(self.steps)} (t = {t:g}); "
            "nothing of this batch was written"
        )
