"""The YAML configuration of the pixel family, checked when it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qdiff.config import ConfigError, fill
from qdiff.resources import find


@dataclass(frozen=True)
class ModelConfig:
    """The UNet: the `model` section of the YAML file, and the image size of its `data` section."""

    image_size: int
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float = 0.0
    resamp_with_conv: bool = True
    norm_groups: int = 32


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process: the `diffusion` section of the YAML file."""

    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_diffusion_timesteps: int = 1000


@dataclass(frozen=True)
class TrainingConfig:
    """Training of an embedded model: the `training` section of its YAML file."""

    batch_size: int = 64
    steps: int = 6000
    lr: float = 8e-4
    warmup_steps: int = 200
    decay_fraction: float = 0.25
    ema_rate: float = 0.999
    min_snr_gamma: float = 5.0
    grad_clip: float = 1.0
    seed: int = 0
    flip: bool = True  # mirror images at random


@dataclass(frozen=True)
class PixelConfig:
    """A whole configuration file. `pretrained`: a public model's name, or a file beside the YAML's repository."""

    path: Path
    model: ModelConfig
    diffusion: DiffusionConfig
    batch_size: int
    pretrained: str | None
    training: dict[str, Any]


PUBLIC_MODELS = {"CIFAR10": "ema_cifar10"}  # LSUN is told apart by data.category


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Build and check a ModelConfig; lists become tuples, keys that concern training only are ignored.

    Raises:
        ConfigError: a setting is missing or cannot work.
    """
    config = fill(ModelConfig, values, "model", others=True)
    sizes = [config.image_size // 2**level for level in range(len(config.ch_mult))]
    if config.image_size % 2 ** (len(config.ch_mult) - 1):
        raise ConfigError(f"image_size {config.image_size}: cannot be halved {len(config.ch_mult) - 1} times")
    if config.ch % config.norm_groups:
        raise ConfigError(f"model.ch {config.ch}: expected a multiple of the {config.norm_groups} groups of the norms")
    if not set(config.attn_resolutions) <= set(sizes):
        raise ConfigError(f"model.attn_resolutions {list(config.attn_resolutions)}: expected some of {sizes}")
    return config


def load_config(path: str | Path) -> PixelConfig:
    """Read a pixel-family YAML file.

    Raises:
        ConfigError: no such file, not YAML, or a setting is missing or cannot work.
    """
    path = find(path)
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not a YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict) or not {"data", "model", "diffusion"} <= set(values):
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"--config {path}: expected the sections data, model and diffusion of the pixel family, found {found}")
    data, model = values["data"], values["model"]
    diffusion = fill(DiffusionConfig, values["diffusion"], "diffusion", others=True)
    if diffusion.beta_schedule != "linear":
        raise ConfigError(f"diffusion.beta_schedule {diffusion.beta_schedule!r}: expected linear")
    if model.get("type", "simple") != "simple":
        raise ConfigError(f"model.type {model['type']!r}: expected simple")
    return PixelConfig(
        path=path,
        model=model_config_from_dict({"image_size": data.get("image_size"), **model}),
        diffusion=diffusion,
        batch_size=int(values.get("sampling", {}).get("batch_size", 64)),
        pretrained=model.get("pretrained") or _public_model(data),
        training=values.get("training", {}),
    )


def training_config(values: dict[str, Any]) -> TrainingConfig:
    return fill(TrainingConfig, values, "training")


def _public_model(data: dict[str, Any]) -> str | None:
    if data.get("dataset") == "LSUN":
        return f"ema_lsun_{str(data.get('category', '')).removesuffix('_outdoor')}"
    return PUBLIC_MODELS.get(str(data.get("dataset")))
