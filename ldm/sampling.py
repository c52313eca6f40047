"""Sampling of the latent family: from noise, settings, conditions and a network to latents."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import LatentCheckpoint
from ldm.conditions import Conditions
from ldm.config import LatentConfig
from ldm.family import LATENT, unet_config_dict
from ldm.samplers import LATENT_SAMPLERS, Guided, LatentSamplerConfig
from qdiff.calibration.data import CalibrationSet, generate
from qdiff.config import CalibrationConfig
from qdiff.prediction import EpsNetwork, name_of
from qdiff.samplers import Callback, Denoiser
from qdiff.task import QuantizationTask
from qdiff.utils.noise import CALIBRATION, SAMPLING, NoiseSource


class LatentSampler:
    """A sampler for the latents of one model; call it with a network and the indices of images.

    Args:
        config: the configuration of the model.
        settings: the sampling algorithm and its settings.
        device: the device of the network.
        shape: (C, h, w) of the latents (default: the model's).
        conditions: the contexts of the images. None for an unconditional model.
        repeat_noise: the noise of image i is that of image i modulo this number. None: every image has its own noise.

    Raises:
        ConfigError: a setting names an unknown algorithm.
    """

    def __init__(
        self,
        config: LatentConfig,
        settings: LatentSamplerConfig,
        device: torch.device,
        shape: tuple[int, int, int] | None = None,
        conditions: Conditions | None = None,
        repeat_noise: int | None = None,
    ) -> None:
        self.config, self.settings, self.device, self.conditions = config, settings, device, conditions
        self.repeat_noise = repeat_noise
        self.shape = shape or (config.channels, config.image_size, config.image_size)
        self.prediction = config.prediction
        self.sampler = LATENT_SAMPLERS.get(settings.sampler)
        self.timesteps = self.sampler.timesteps(settings, config.timesteps)

    @property
    def evaluations(self) -> int:
        """The number of network evaluations of one image; guidance evaluates both contexts at once."""
        return self.sampler.num_evaluations(self.timesteps)

    def denoiser(self, network: Callable[..., Tensor], indices: Sequence[int]) -> EpsNetwork:
        """Return eps(z_t, t) for these images, with their contexts and guidance.

        Args:
            network: the UNet, called with (z_t [N, C, h, w], t [N]), and with contexts [N, L, D] if the model is
                conditional.
            indices: the N images of a batch.
        """
        conditioned: Denoiser = network
        if self.conditions is not None:
            context, unconditional = self.conditions(indices)
            conditioned = Guided(network, context, unconditional, self.settings.scale)
        return EpsNetwork(conditioned, self.prediction, name_of(network))

    @torch.no_grad()
    def __call__(
        self,
        network: Callable[..., Tensor],
        indices: Sequence[int],
        seed: int,
        callback: Callback | None = None,
        stream: int = SAMPLING,
    ) -> Tensor:
        """Sample a batch.

        Args:
            network: the UNet; see `denoiser`.
            indices: the N images of the batch; the noise of an image depends on its index and the seed alone.
            seed: 0 to 2^63 - 1.
            callback: called with (z_t, t, eps) after every evaluation of the network.
            stream: SAMPLING or CALIBRATION, which give the same seed different images.

        Returns:
            Scaled latents [N, C, h, w].

        Raises:
            NonFiniteError: a value is not finite.
        """
        noise_indices = [i % self.repeat_noise for i in indices] if self.repeat_noise else indices
        noise = NoiseSource(seed, noise_indices, self.shape, self.device, stream)
        denoiser = self.denoiser(network, indices)
        alphas_cumprod, eta = self.prediction.alphas_cumprod, self.settings.eta
        return denoiser.check(
            self.sampler.sample(denoiser, noise(), alphas_cumprod, self.timesteps, noise, callback, eta)
        )


def make_calibration_set(
    network: Callable[..., Tensor], sampler: LatentSampler, seed: int, config: CalibrationConfig
) -> CalibrationSet:
    """Record the network's inputs while the full-precision model samples, with noise of a stream of its own.

    Args:
        network: the full-precision UNet.
        sampler: the sampler whose trajectories are recorded.
        seed: seed of the noise.
        config: how many time steps to keep, how many samples of each, and the batch size.

    Returns:
        The calibration set; that of a conditional model has the contexts too.
    """

    def run(indices: list[int], callback: Callable) -> None:
        sampler(network, indices, seed, callback, stream=CALIBRATION)

    data = generate(run, config.num_timesteps, sampler.evaluations, config.samples, config.batch_size)
    if sampler.conditions is None:
        return data
    context, unconditional = (contexts.float().cpu() for contexts in sampler.conditions(range(config.samples)))
    return replace(data, cs=[context] * len(data.xs), ucs=[unconditional] * len(data.xs))


def latent_task(
    checkpoint: Callable[[], LatentCheckpoint],
    sampler: LatentSampler,
    seed: int,
    save_model_parts: Callable[[Path], None] | None = None,
) -> QuantizationTask:
    """A latent model, ready to be quantized.

    Args:
        checkpoint: opens the model's checkpoint.
        sampler: the sampler that draws calibration samples.
        seed: seed of the calibration samples.
        save_model_parts: writes the first stage and the conditioner to a file; None: those of the checkpoint.
    """
    return QuantizationTask(
        architecture=LATENT,
        unet_config=unet_config_dict(sampler.config.unet),
        input_shape=sampler.shape,
        evaluations=sampler.evaluations,
        load_unet=lambda: checkpoint().unet(),
        make_calibration_set=lambda network, recipe: make_calibration_set(network, sampler, seed, recipe),
        prediction=sampler.prediction,
        weight_scale_method="mse",
        act_scale_method="mse",
        context_dim=sampler.config.unet.context_dim,
        save_model_parts=save_model_parts or (lambda path: checkpoint().model_parts().save(path)),
    )
