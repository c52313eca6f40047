"""Errors of quantized networks along sampling trajectories, relative to full precision."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.errors import NonFiniteError

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepErrors:
    """Relative errors ||q - f|| / ||f|| over all images.

    Attributes:
        per_step: the error at each evaluation of the network, in order of sampling.
    """

    per_step: list[float]

    @property
    def mean(self) -> float:
        """The mean over the evaluations."""
        return sum(self.per_step) / len(self.per_step)


class Trajectories:
    """Errors of networks along trajectories, accumulated over chunks of images.

    For each chunk, first sample in full precision with the callback of `watch`. Then sample with each network, from the
    same noise, with the callback of `follow`.
    """

    def __init__(self) -> None:
        self._eps: dict[str, list[list[float]]] = defaultdict(list)
        self._x: dict[str, list[list[float]]] = defaultdict(list)

    def watch(self, networks: Mapping[str, Denoiser]) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Start a chunk. The callback evaluates every network on the full-precision x_t (the trajectory error).

        Args:
            networks: by their names.

        Returns:
            The callback (x, t, eps) of the full-precision sampler.
        """
        self._states: list[Tensor] = []

        @torch.no_grad()
        def callback(x: Tensor, t: Tensor, eps: Tensor) -> None:
            step = len(self._states)
            self._states.append(x.cpu())
            for name, network in networks.items():
                _add(self._eps[name], step, network(x, t) - eps, eps)

        return callback

    def follow(self, name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Return the callback (x, t, eps) of a network's own sampler, which compares x_t with full precision."""
        steps = iter(enumerate(self._states))

        def callback(x: Tensor, t: Tensor, eps: Tensor) -> None:
            step, state = next(steps)
            _add(self._x[name], step, x.cpu() - state, state)

        return callback

    def eps_errors(self) -> dict[str, StepErrors]:
        """The errors of eps on the full-precision trajectory, by the networks' names."""
        return {name: _errors(name, sums) for name, sums in self._eps.items()}

    def x_errors(self) -> dict[str, StepErrors]:
        """The errors of x_t on the networks' own trajectories, by their names."""
        return {name: _errors(name, sums) for name, sums in self._x.items()}


def _add(sums: list[list[float]], step: int, difference: Tensor, reference: Tensor) -> None:
    """Add the squared norms of both tensors to the sums of a step."""
    if step == len(sums):
        sums.append([0.0, 0.0])
    for i, tensor in enumerate((difference, reference)):
        sums[step][i] += tensor.cpu().double().square().sum().item()  # MPS has no float64


def _errors(name: str, sums: list[list[float]]) -> StepErrors:
    """Relative errors from sums of squares; NonFiniteError if a sum is not finite."""
    for step, pair in enumerate(sums):
        if not all(map(math.isfinite, pair)):
            raise NonFiniteError(f"{name}: values that are not finite numbers, first at step {step + 1} of {len(sums)}")
    return StepErrors([(difference / reference) ** 0.5 for difference, reference in sums])


def trajectory_errors(
    run_sampler: Callable[[Callable], object], networks: Mapping[str, Denoiser]
) -> dict[str, StepErrors]:
    """Measure the trajectory error of each network.

    Args:
        run_sampler: samples in full precision with the callback (x, t, eps) that it gets.
        networks: by their names.
    """
    trajectories = Trajectories()
    run_sampler(trajectories.watch(networks))
    return trajectories.eps_errors()
