"""Sampling of the pixel family: from noise, settings and a network to images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddim.config import PixelConfig
from ddim.family import PIXEL, unet_config_dict
from ddim.samplers import PIXEL_SAMPLERS, PixelSamplerConfig
from ddim.schedule import make_prediction
from ddim.weights import load_unet
from qdiff.calibration.data import CalibrationSet, generate
from qdiff.config import CalibrationConfig
from qdiff.prediction import EpsNetwork, name_of
from qdiff.samplers import Callback, Denoiser
from qdiff.task import QuantizationTask
from qdiff.utils.noise import CALIBRATION, SAMPLING, NoiseSource


class PixelSampler:
    """A sampler for the images of one model; call it with a network and the indices of images.

    Args:
        config: the configuration of the model.
        settings: the sampling algorithm and its settings.
        device: the device of the network.

    Raises:
        ConfigError: a setting names an unknown algorithm or spacing.
    """

    def __init__(self, config: PixelConfig, settings: PixelSamplerConfig, device: torch.device) -> None:
        self.config, self.settings, self.device = config, settings, device
        self.prediction = make_prediction(config.diffusion)
        self.shape = (config.model.in_channels, config.model.image_size, config.model.image_size)
        self.sampler = PIXEL_SAMPLERS.get(settings.sample_type)
        self.timesteps = self.sampler.timesteps(settings, config.diffusion.num_diffusion_timesteps)
        self.sample = self.sampler.clipped(config.clip_x0)

    @property
    def evaluations(self) -> int:
        """The number of network evaluations of one image."""
        return self.sampler.num_evaluations(self.timesteps)

    def denoiser(self, network: Denoiser, indices: Sequence[int]) -> EpsNetwork:
        """Return eps(x_t, t) for these images."""
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
        """Sample a batch.

        Args:
            network: the UNet, called with (x_t [N, C, H, W], t [N]).
            indices: the N images of the batch; the noise of an image depends on its index and the seed alone.
            seed: 0 to 2^63 - 1.
            callback: called with (x_t, t, eps) after every evaluation of the network.
            stream: SAMPLING or CALIBRATION, which give the same seed different images.

        Returns:
            Images [N, C, H, W], about [-1, 1].

        Raises:
            NonFiniteError: a value is not finite.
        """
        noise = NoiseSource(seed, indices, self.shape, self.device, stream)
        denoiser = self.denoiser(network, indices)
        alphas_cumprod, eta = self.prediction.alphas_cumprod, self.settings.eta
        return denoiser.check(self.sample(denoiser, noise(), alphas_cumprod, self.timesteps, noise, callback, eta))


def make_calibration_set(
    network: Denoiser, sampler: PixelSampler, seed: int, config: CalibrationConfig
) -> CalibrationSet:
    """Record the network's inputs while the full-precision model samples, with noise of a stream of its own.

    Args:
        network: the full-precision UNet.
        sampler: the sampler whose trajectories are recorded.
        seed: seed of the noise.
        config: how many time steps to keep, and how many samples of each.
    """

    def run(indices: list[int], callback: Callable) -> None:
        sampler(network, indices, seed, callback, stream=CALIBRATION)

    return generate(run, config.num_timesteps, sampler.evaluations, config.samples, sampler.config.batch_size)


def pixel_task(
    config: PixelConfig, checkpoint: str | Path | None, sampler: PixelSampler, seed: int
) -> QuantizationTask:
    """A pixel model, ready to be quantized.

    Args:
        config: the configuration of the model.
        checkpoint: a local file with full-precision weights; None: the weights that the configuration names.
        sampler: the sampler that draws calibration samples.
        seed: seed of the calibration samples.
    """
    return QuantizationTask(
        architecture=PIXEL,
        unet_config=unet_config_dict(config.model),
        input_shape=sampler.shape,
        evaluations=sampler.evaluations,
        load_unet=lambda: load_unet(config, checkpoint),
        make_calibration_set=lambda network, recipe: make_calibration_set(network, sampler, seed, recipe),
        prediction=sampler.prediction,
    )
