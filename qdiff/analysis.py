"""How far a quantized network is from full precision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.compat import make_torchvision_importable

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrajectoryError:
    """Relative error of eps along the full-precision trajectory.

    per_step: ||e_q - e|| / ||e|| over the whole batch, in order of sampling. mean: over the steps.
    """

    per_step: list[float]

    @property
    def mean(self) -> float:
        return sum(self.per_step) / len(self.per_step)


class TrajectoryProbe:
    """A sampler's callback: evaluates quantized networks on the full-precision x_t and keeps their error.

    All images must go through the sampler as one batch (the norms are over the whole batch).
    """

    def __init__(self, networks: Mapping[str, Denoiser]) -> None:
        self.networks = networks
        self._errors: dict[str, list[float]] = {name: [] for name in networks}

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, eps: Tensor) -> None:
        for name, network in self.networks.items():
            self._errors[name].append(((network(x, t) - eps).norm() / eps.norm()).item())

    def errors(self) -> dict[str, TrajectoryError]:
        return {name: TrajectoryError(values) for name, values in self._errors.items()}


def trajectory_errors(run_sampler: Callable[[Callable], object], networks: Mapping[str, Denoiser]) -> dict[str, TrajectoryError]:
    """The trajectory error of each network; `run_sampler` samples in full precision with the callback it is given."""
    probe = TrajectoryProbe(networks)
    run_sampler(probe)
    return probe.errors()


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images [N, C, H, W] over the whole batch; inf if equal."""
    error = (images.double() - reference.double()).square().mean()
    return (10 * torch.log10(255**2 / error)).item()


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of uint8 images [N, C, H, W], 11x11 Gaussian window."""
    make_torchvision_importable()
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images.float(), reference.float(), data_range=255.0).item()
