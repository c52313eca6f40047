"""From noise and settings to images: the pixel family's samplers behind one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.config import DiffusionConfig, PixelConfig
from ddim.family import PIXEL, describe
from ddim.samplers import Callback, Denoiser, ddim_steps, sample_ddim, sample_ddpm, sample_dpm_solver
from ddim.schedule import make_prediction
from ddim.weights import load_unet
from qdiff.calibration.data import CalibrationSet, generate
from qdiff.config import CalibrationConfig
from qdiff.errors import ConfigError
from qdiff.prediction import EpsNetwork, name_of
from qdiff.utils.noise import CALIBRATION, SAMPLING, NoiseSource


@dataclass(frozen=True)
class SamplerSettings:
    """sample_type: generalized (DDIM) | dpm_solver | ddpm_noisy; skip_type: uniform | quad; eta: DDIM's noise."""

    sample_type: str = "generalized"
    skip_type: str = "uniform"
    timesteps: int = 1000
    eta: float = 0.0

    def validate(self, diffusion: DiffusionConfig) -> "SamplerSettings":
        """Return self, or raise ConfigError naming the option."""
        if not 1 <= self.timesteps <= diffusion.num_diffusion_timesteps:
            raise ConfigError(f"--timesteps {self.timesteps}: expected 1 to {diffusion.num_diffusion_timesteps}")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta:g}: expected 0 to 1")
        if self.sample_type == "dpm_solver" and self.eta:
            raise ConfigError(f"dpm_solver is deterministic: expected eta 0, found {self.eta:g}")
        return self


class PixelSampler:
    """Call it with a network and the indices of images: [N, C, H, W], about [-1, 1]; NonFiniteError where a value is not finite.

    Args:
        config: the model's configuration. settings: the sampler. device: where the network is.
    """

    def __init__(self, config: PixelConfig, settings: SamplerSettings, device: torch.device) -> None:
        self.config, self.settings, self.device = config, settings, device
        self.prediction = make_prediction(config.diffusion)
        self.shape = (config.model.in_channels, config.model.image_size, config.model.image_size)
        self.steps = ddim_steps(settings.skip_type, settings.timesteps, config.diffusion.num_diffusion_timesteps)

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for one image."""
        return self.settings.timesteps if self.settings.sample_type == "dpm_solver" else len(self.steps)

    def denoiser(self, network: Denoiser, indices: Sequence[int]) -> EpsNetwork:
        """eps(x_t, t) for these images."""
        return EpsNetwork(network, self.prediction, name_of(network))

    @torch.no_grad()
    def __call__(
        self,
        network: Denoiser,
        indices: Sequence[int],
        seed: int,
        callback: Callback | None = None,
        stream: int = SAMPLING,
    ) -> Tensor:
        noise = NoiseSource(seed, indices, self.shape, self.device, stream)
        denoiser = self.denoiser(network, indices)
        return denoiser.check(self._sample(denoiser, noise(), noise, callback))

    def _sample(self, denoiser: Denoiser, x: Tensor, noise: NoiseSource, callback: Callback | None) -> Tensor:
        a = self.prediction.alphas_cumprod
        if self.settings.sample_type == "dpm_solver":
            return sample_dpm_solver(denoiser, x, a, self.settings.timesteps, noise, callback)
        if self.settings.sample_type == "ddpm_noisy":
            return sample_ddpm(denoiser, x, a, self.steps, noise, callback)
        return sample_ddim(denoiser, x, a, self.steps, noise, callback, self.settings.eta)


def make_calibration_set(
    network: Denoiser, sampler: PixelSampler, seed: int, config: CalibrationConfig
) -> CalibrationSet:
    """Run the full-precision sampler on noise of its own stream and keep `config.steps` of its steps."""

    def run(indices: list[int], callback: Callable) -> None:
        sampler(network, indices, seed, callback, stream=CALIBRATION)

    return generate(run, config.steps, sampler.evaluations, config.samples, sampler.config.batch_size)


def pixel_task_parts(config: PixelConfig, checkpoint: str | None, sampler: PixelSampler, seed: int) -> dict[str, Any]:
    """What the shared steps of the scripts need to know of this family."""
    return {
        "family": PIXEL,
        "build": describe(config.model),
        "input_shape": sampler.shape,
        "evaluations": sampler.evaluations,
        "prediction": sampler.prediction,
        "load": lambda: load_unet(config, checkpoint),
        "generate": lambda network, calibration: make_calibration_set(network, sampler, seed, calibration),
        "weight_method": "max",
        "act_method": "max",
    }
