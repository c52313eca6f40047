"""Detection of NaN and infinity: in weights before work begins, and in a network's outputs while it samples."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qdiff.errors import NonFiniteError


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None: all values are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


class OutputMonitor:
    """Remembers for each evaluation of a network whether its output was finite.

    The flags stay on the network's device until `check` reads them, so that sampling does not wait for the device in
    every step.
    """

    def __init__(self) -> None:
        self._evaluations: list[tuple[Tensor, Tensor]] = []  # (time step, whether all values are finite), scalars

    def add(self, t: Tensor, output: Tensor) -> None:
        """Record the `output` [N, ...] of an evaluation at time steps `t` [N]."""
        self._evaluations.append((t[0], torch.isfinite(output).all()))

    def check(self, network: str) -> None:
        """Check all recorded evaluations.

        Args:
            network: what the message calls the network.

        Raises:
            NonFiniteError: an output was not finite. The message names the first evaluation with such an output.
        """
        evaluations = self._evaluations
        if not evaluations or bool(torch.stack([finite for _, finite in evaluations]).all()):
            return
        number, t = next((i, t.item()) for i, (t, finite) in enumerate(evaluations) if not finite)
        raise NonFiniteError(
            f"{network}: values that are not finite numbers, first at step {number + 1} of {len(evaluations)} "
            f"(t = {t:g}); nothing of this batch was written"
        )
