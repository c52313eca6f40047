"""From noise, settings and conditions to latents: the latent family's samplers behind one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddim.samplers import Callback, Denoiser
from ldm.checkpoint import LatentCheckpoint
from ldm.conditions import Conditions
from ldm.config import LatentConfig
from ldm.family import LATENT, describe
from ldm.samplers import Guided, latent_steps, sample_ancestral, sample_ddim, sample_dpm_solver_2m, sample_plms
from qdiff.calibration.data import CalibrationSet, generate
from qdiff.config import CalibrationConfig
from qdiff.errors import ConfigError
from qdiff.prediction import EpsNetwork, name_of
from qdiff.utils.noise import CALIBRATION, SAMPLING, NoiseSource


@dataclass(frozen=True)
class LatentSettings:
    """sampler: ddim | plms | dpm | vanilla; steps as `-c` and `--ddim_steps` give them; eta: DDIM's noise; scale: guidance."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    scale: float = 1.0

    def validate(self, config: LatentConfig) -> "LatentSettings":
        """Return self, or raise ConfigError naming the setting."""
        if not 1 <= self.steps <= config.timesteps:
            raise ConfigError(f"{self.steps} sampling steps: expected 1 to {config.timesteps}")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta {self.eta:g}: expected 0 to 1")
        if self.sampler in ("plms", "dpm") and self.eta:
            raise ConfigError(f"{self.sampler} is deterministic: expected eta 0, found {self.eta:g}")
        return self


class LatentSampler:
    """Call it with a UNet and the indices of images: scaled latents [N, C, h, w]; NonFiniteError where a value is not finite.

    Args:
        shape: (C, h, w) of the latents. conditions: from indices to the contexts (given, without), each
            [N, L, D]; None for an unconditional model. repeat_noise: the noises repeat after so many images.
    """

    def __init__(
        self,
        config: LatentConfig,
        settings: LatentSettings,
        device: torch.device,
        shape: tuple[int, int, int] | None = None,
        conditions: Conditions | None = None,
        repeat_noise: int | None = None,
    ) -> None:
        self.config, self.settings, self.device, self.conditions = config, settings, device, conditions
        self.repeat_noise = repeat_noise
        self.shape = shape or (config.channels, config.image_size, config.image_size)
        self.prediction = config.prediction
        every = settings.sampler == "vanilla"
        self.steps = list(range(config.timesteps)) if every else latent_steps(settings.steps, config.timesteps)

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for one image (once for both contexts of a guided model)."""
        if self.settings.sampler == "dpm":
            return self.settings.steps
        return len(self.steps) + (self.settings.sampler == "plms")

    def denoiser(self, network: Denoiser, indices: Sequence[int]) -> EpsNetwork:
        """eps(z_t, t) for these images: `network` under its conditions, with guidance."""
        conditioned = network
        if self.conditions is not None:
            context, without = self.conditions(indices)
            conditioned = Guided(network, context, without, self.settings.scale)
        return EpsNetwork(conditioned, self.prediction, name_of(network))

    @torch.no_grad()
    def __call__(
        self,
        network: Denoiser,
        indices: Sequence[int],
        seed: int,
        callback: Callback | None = None,
        stream: int = SAMPLING,
    ) -> Tensor:
        numbers = [i % self.repeat_noise for i in indices] if self.repeat_noise else indices
        noise = NoiseSource(seed, numbers, self.shape, self.device, stream)
        denoiser = self.denoiser(network, indices)
        return denoiser.check(self._sample(denoiser, noise(), noise, callback))

    def _sample(self, denoiser: Denoiser, x: Tensor, noise: NoiseSource, callback: Callback | None) -> Tensor:
        a = self.prediction.alphas_cumprod
        if self.settings.sampler == "dpm":
            return sample_dpm_solver_2m(denoiser, x, a, self.settings.steps, noise, callback)
        if self.settings.sampler == "plms":
            return sample_plms(denoiser, x, a, self.steps, noise, callback)
        if self.settings.sampler == "vanilla":
            return sample_ancestral(denoiser, x, a, self.steps, noise, callback)
        return sample_ddim(denoiser, x, a, self.steps, noise, callback, self.settings.eta)


def make_calibration_set(
    network: Denoiser, sampler: LatentSampler, seed: int, config: CalibrationConfig
) -> CalibrationSet:
    """Run the full-precision sampler on noise of its own stream and keep `config.steps` of its steps, with the contexts."""

    def run(indices: list[int], callback: Callable) -> None:
        sampler(network, indices, seed, callback, stream=CALIBRATION)

    data = generate(run, config.steps, sampler.evaluations, config.samples, config.batch_size)
    if sampler.conditions is None:
        return data
    context, without = (part.float().cpu() for part in sampler.conditions(range(config.samples)))
    return replace(data, cs=[context] * len(data.xs), ucs=[without] * len(data.xs))


def latent_task_parts(
    checkpoint: Callable[[], LatentCheckpoint], sampler: LatentSampler, seed: int, methods: tuple[str, str]
) -> dict[str, Any]:
    """What the shared steps of the scripts need to know of this family; `methods`: the scale rules of weights and activations."""
    return {
        "family": LATENT,
        "build": describe(sampler.config.unet),
        "input_shape": sampler.shape,
        "evaluations": sampler.evaluations,
        "prediction": sampler.prediction,
        "load": lambda: checkpoint().unet(),
        "generate": lambda network, calibration: make_calibration_set(network, sampler, seed, calibration),
        "weight_method": methods[0],
        "act_method": methods[1],
    }
