"""How far a quantized network is from full precision."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.errors import NonFiniteError
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.extras import require_extra

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepErrors:
    """Relative errors at each evaluation of the network, in order of sampling: ||q - f|| / ||f|| over all images."""

    per_step: list[float]

    @property
    def mean(self) -> float:
        return sum(self.per_step) / len(self.per_step)


class Trajectories:
    """Errors of networks along trajectories, summed up over chunks of images.

    For each chunk, `watch` is the callback of the full-precision sampler: it evaluates every network on the
    full-precision x_t (the trajectory error). `follow` is the callback of a network's own sampler from the same noise: it
    compares its x_t with that of full precision.
    """

    def __init__(self) -> None:
        self._eps: dict[str, list[list[float]]] = defaultdict(list)
        self._x: dict[str, list[list[float]]] = defaultdict(list)

    def watch(self, networks: Mapping[str, Denoiser]) -> Callable[[Tensor, Tensor, Tensor], None]:
        self._states: list[Tensor] = []

        @torch.no_grad()
        def callback(x: Tensor, t: Tensor, eps: Tensor) -> None:
            step = len(self._states)
            self._states.append(x.cpu())
            for name, network in networks.items():
                _add(self._eps[name], step, network(x, t) - eps, eps)

        return callback

    def follow(self, name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        steps = iter(enumerate(self._states))

        def callback(x: Tensor, t: Tensor, eps: Tensor) -> None:
            step, state = next(steps)
            _add(self._x[name], step, x.cpu() - state, state)

        return callback

    def eps_errors(self) -> dict[str, StepErrors]:
        return {name: _errors(name, sums) for name, sums in self._eps.items()}

    def x_errors(self) -> dict[str, StepErrors]:
        return {name: _errors(name, sums) for name, sums in self._x.items()}


def _add(sums: list[list[float]], step: int, difference: Tensor, reference: Tensor) -> None:
    if step == len(sums):
        sums.append([0.0, 0.0])
    for i, tensor in enumerate((difference, reference)):
        sums[step][i] += tensor.cpu().double().square().sum().item()  # MPS has no float64


def _errors(name: str, sums: list[list[float]]) -> StepErrors:
    for step, pair in enumerate(sums):
        if not all(map(math.isfinite, pair)):
            raise NonFiniteError(f"{name}: values that are not finite numbers, first at step {step + 1} of {len(sums)}")
    return StepErrors([(difference / reference) ** 0.5 for difference, reference in sums])


def trajectory_errors(
    run_sampler: Callable[[Callable], object], networks: Mapping[str, Denoiser]
) -> dict[str, StepErrors]:
    """The trajectory error of each network; `run_sampler` samples in full precision with the callback it is given."""
    trajectories = Trajectories()
    run_sampler(trajectories.watch(networks))
    return trajectories.eps_errors()


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images [N, C, H, W] over the whole batch; inf if equal."""
    error = (images.double() - reference.double()).square().mean()
    return (10 * torch.log10(255**2 / error)).item()


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of uint8 images [N, C, H, W], 11x11 Gaussian window."""
    require_extra("eval", "torchmetrics")
    make_torchvision_importable()
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images.float(), reference.float(), data_range=255.0).item()
