"""The embedded models as one kind of thing: a network, its sampler with fixed noises, its calibrated checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import REPOSITORY
from common.images import to_uint8, to_uint8_truncated
from ddim import sampling as pixel
from ddim.config import load_config as load_pixel_config
from ddim.family import PIXEL
from ddim.family import describe as describe_pixel
from ddim.weights import load_unet
from ldm import sampling as latent
from ldm.checkpoint import LatentCheckpoint
from ldm.conditions import read_prompts, text_conditions
from ldm.config import load_config as load_latent_config
from ldm.family import LATENT
from ldm.family import describe as describe_latent
from qdiff.calibration.dataset import Rows
from qdiff.calibration.run import nearest_rounding
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.model import Family

NAMES = ("emoji32", "emoji64", "emoji64-text")
PROMPTS = ["red heart", "smiling face", "flag", "cat face", "blue heart", "monkey", "angry face", "panda face"]


@dataclass(frozen=True)
class Embedded:
    """An embedded model with the noises (and prompts) of `images` pictures.

    denoiser: a network under its conditions. sample: from a network (and a callback on its sampler) to
    uint8 images. rows: calibration rows by recipe.
    """

    title: str
    folder: Path
    family: Family
    build: dict
    model: nn.Module
    denoiser: Callable[[nn.Module], Callable]
    sample: Callable[..., Tensor]
    rows: Callable[[CalibrationConfig], Rows]

    def nearest(self, quant: QuantConfig, recipe: CalibrationConfig) -> nn.Module:
        """The baseline: the widths of `quant` by nearest rounding and min-max ranges."""
        return nearest_rounding(self.model, self.family, quant, recipe, self.rows(recipe))


def load_embedded(name: str, images: int, device: torch.device) -> Embedded:
    return _pixel(images, device) if name == "emoji32" else _latent(name, images, device)


def _pixel(images: int, device: torch.device) -> Embedded:
    config, folder = load_pixel_config(REPOSITORY / "configs/emoji32.yml"), REPOSITORY / "models/ddim/emoji32"
    sampler = pixel.PixelSampler(config, pixel.SamplerSettings(skip_type="quad", timesteps=50), device)
    model = load_unet(config, None).to(device)
    return Embedded(
        title="pixel DDPM (emoji32), DDIM 50 steps",
        folder=folder,
        family=PIXEL,
        build=describe_pixel(config.model),
        model=model,
        denoiser=lambda network: network,
        sample=lambda network, callback=None: to_uint8(sampler(network, range(images), 0, callback)),
        rows=lambda recipe: pixel.make_calibration_set(model, sampler, 1234, recipe).select(recipe.steps, recipe.samples),
    )


def _latent(name: str, images: int, device: torch.device) -> Embedded:
    folder = REPOSITORY / "models/ldm" / name
    config = load_latent_config(folder / "config.yaml")
    checkpoint = LatentCheckpoint(folder, config)
    stages, model = checkpoint.stages().to(device), checkpoint.unet().to(device)
    text = config.conditioning is not None
    settings = latent.LatentSettings("plms", 50, 0.0, 7.5) if text else latent.LatentSettings("ddim", 50, 0.0)
    sampler, drawer = (latent.LatentSampler(config, settings, device) for _ in range(2))
    if text:
        prompts = read_prompts(folder / "prompts.txt")
        sampler.conditions = text_conditions(lambda: stages, lambda i: PROMPTS[i % len(PROMPTS)])
        drawer.conditions = text_conditions(lambda: stages, lambda i: prompts[i % len(prompts)])
    return Embedded(
        title="text to image (emoji64-text), PLMS 50 steps, guidance 7.5: " + ", ".join(PROMPTS)
        if text
        else "latent diffusion (emoji64), DDIM 50 steps",
        folder=folder,
        family=LATENT,
        build=describe_latent(config.unet),
        model=model,
        denoiser=lambda network: sampler.denoiser(network, range(images)),
        sample=lambda network, callback=None: to_uint8_truncated(stages.decode(sampler(network, range(images), 0, callback))),
        rows=lambda recipe: latent.make_calibration_set(model, drawer, 1234, recipe).select(recipe.steps, recipe.samples),
    )
