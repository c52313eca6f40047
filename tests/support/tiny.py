"""A pixel model small enough to calibrate in seconds, as a network and as files for the scripts."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from ddim.config import DiffusionConfig, ModelConfig, PixelConfig
from ddim.sampling import PixelSampler, PixelSamplerConfig, make_calibration_set
from ddim.unet import UNet
from qdiff.calibration.data import CalibrationData
from qdiff.config import CalibrationConfig

MODEL = ModelConfig(
    image_size=8,
    in_channels=3,
    out_ch=3,
    ch=16,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    dropout=0.1,
    norm_groups=4,
)


def unet(seed: int = 0, config: ModelConfig = MODEL) -> UNet:
    """Random weights, uneven across output channels as those of trained networks are."""
    torch.manual_seed(seed)
    network = UNet(config).eval().requires_grad_(False)
    for name, p in network.named_parameters():
        if p.dim() > 1:
            p.mul_(torch.rand(len(p), *[1] * (p.dim() - 1)) + 0.5)
        elif "norm" not in name:
            p.normal_(0, 0.1)
    return network


def config_file(folder: Path, **model) -> Path:
    names = ("ch", "in_channels", "out_ch", "num_res_blocks", "dropout", "norm_groups")
    section = {name: getattr(MODEL, name) for name in names}
    section |= {"ch_mult": list(MODEL.ch_mult), "attn_resolutions": list(MODEL.attn_resolutions)} | model
    content = {
        "data": {"dataset": "none", "image_size": MODEL.image_size},
        "model": section,
        "diffusion": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
        "sampling": {"batch_size": 4},
    }
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def weights_file(folder: Path) -> Path:
    path = folder / "tiny.safetensors"
    save_file(unet().state_dict(), path)
    return path


def sampler(timesteps: int = 8) -> PixelSampler:
    config = PixelConfig(Path("tiny"), MODEL, DiffusionConfig(), 16, None, {})
    return PixelSampler(config, PixelSamplerConfig(skip_type="quad", timesteps=timesteps), torch.device("cpu"))


def rows(network: UNet, steps: int = 4, samples: int = 16) -> CalibrationData:
    config = CalibrationConfig(num_timesteps=steps, samples=samples)
    return make_calibration_set(network, sampler(), 7, config).select(steps, samples)
