"""The YAML configuration of the pixel family, validated when it is read."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from qdiff.errors import ConfigError
from qdiff.prediction import PREDICTIONS
from qdiff.utils.resources import find
from qdiff.utils.settings import check_names, fill, typed


@dataclass(frozen=True)
class ModelConfig:
    """The UNet: the `model` section of the YAML file, and the image size of its `data` section.

    Attributes:
        image_size: width and height of the images in pixels.
        in_channels: channels of the images.
        out_ch: channels of the output; the same as `in_channels`.
        ch: width of the first layer, a multiple of `norm_groups`.
        ch_mult: width of each resolution, as a multiple of `ch`.
        num_res_blocks: residual blocks of each resolution.
        attn_resolutions: the image sizes at which attention follows each residual block.
        dropout: probability of dropout in training, 0 to 1.
        resamp_with_conv: whether changes of the resolution contain a convolution.
        norm_groups: groups of the normalizations. The published models have 32.
    """

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
    """The forward process: the `diffusion` section of the YAML file.

    Attributes:
        beta_schedule: `linear`.
        beta_start: beta of the first time step.
        beta_end: beta of the last time step.
        num_diffusion_timesteps: number of time steps T.
        parameterization: what the network predicts: eps, x0 or v (`qdiff.prediction`).
    """

    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_diffusion_timesteps: int = 1000
    parameterization: str = "eps"


@dataclass(frozen=True)
class TrainingConfig:
    """The training of a bundled model: the `training` section of its YAML file.

    Attributes:
        batch_size: images of one iteration.
        steps: number of iterations.
        lr: learning rate of the plateau.
        warmup_steps: iterations of the linear warm-up.
        decay_fraction: fraction of the iterations, at the end, in which the learning rate decays to 0.
        ema_rate: decay of the exponential moving average of the parameters.
        min_snr_gamma: gamma of the min-SNR weights (arXiv 2303.09556).
        grad_clip: largest norm of the gradient.
        seed: seed of the training.
        flip: whether to mirror images at random.
    """

    batch_size: int = 64
    steps: int = 6000
    lr: float = 8e-4
    warmup_steps: int = 200
    decay_fraction: float = 0.25
    ema_rate: float = 0.999
    min_snr_gamma: float = 5.0
    grad_clip: float = 1.0
    seed: int = 0
    flip: bool = True


@dataclass(frozen=True)
class PixelConfig:
    """A whole configuration file.

    Attributes:
        path: the YAML file.
        model: the UNet.
        diffusion: the forward process.
        batch_size: images that are sampled at a time by default.
        pretrained: the name of a public checkpoint, or a file of the repository; None: the file names no weights.
        training: the `training` section; see `training_config`.
        clip_x0: the largest |x_0| that a sampler may predict, from `clip_sample` of a folder of diffusers; infinity:
            there is no limit. None: each sampler does as the published one does.
    """

    path: Path
    model: ModelConfig
    diffusion: DiffusionConfig
    batch_size: int
    pretrained: str | None
    training: dict[str, Any]
    clip_x0: float | None = None


# Keys of the released YAML files that only the published training reads, and keys that must have one certain value.
IGNORED_SECTIONS = {"optim"}
DATA = {"dataset", "category", "image_size", "channels", "random_flip", "num_workers"}
DATA_VALUES = {
    "rescaled": True,
    "logit_transform": False,
    "uniform_dequantization": False,
    "gaussian_dequantization": False,
}
MODEL = {"type", "pretrained", "var_type", "ema_rate", "ema"}
SAMPLING = {"batch_size", "last_only"}
TRAINING = {"n_epochs", "n_iters", "snapshot_freq", "validation_freq"}
PUBLIC_MODELS = {"CIFAR10": "ema_cifar10"}  # those of LSUN depend on data.category, see `_public_model`


def model_config_from_dict(values: dict[str, Any], ignored: Iterable[str] = ()) -> ModelConfig:
    """Make and validate a ModelConfig.

    Args:
        values: the settings; lists become tuples.
        ignored: further keys that `values` may have.

    Raises:
        ConfigError: a setting is missing, unknown or cannot work.
    """
    config = fill(ModelConfig, values, "model", ignored)
    for name in ("image_size", "in_channels", "out_ch", "ch", "num_res_blocks", "norm_groups"):
        if getattr(config, name) < 1:
            raise ConfigError(f"model.{name} {getattr(config, name)}: expected at least 1")
    if not config.ch_mult or min(config.ch_mult) < 1:
        raise ConfigError(f"model.ch_mult {list(config.ch_mult)}: expected numbers of at least 1")
    sizes = [config.image_size // 2**level for level in range(len(config.ch_mult))]
    if config.image_size % 2 ** (len(config.ch_mult) - 1):
        raise ConfigError(f"image_size {config.image_size}: cannot be halved {len(config.ch_mult) - 1} times")
    if config.ch % config.norm_groups:
        raise ConfigError(f"model.ch {config.ch}: expected a multiple of the {config.norm_groups} groups of the norms")
    if not set(config.attn_resolutions) <= set(sizes):
        raise ConfigError(f"model.attn_resolutions {list(config.attn_resolutions)}: expected some of {sizes}")
    if config.out_ch != config.in_channels:
        raise ConfigError(
            f"model.out_ch {config.out_ch}: expected {config.in_channels}, the in_channels; networks that predict a "
            "variance too are not supported"
        )
    return config


def load_config(path: str | Path) -> PixelConfig:
    """Read a YAML file of the pixel family.

    Raises:
        ConfigError: the file does not exist or is not YAML, or a setting is missing, unknown or cannot work.
    """
    path = find(path)
    if not path.is_file():
        raise ConfigError(f" {path}: no such file", field="config")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f" {path}: not a YAML file ({str(error).splitlines()[0]})", field="config") from None
    if not isinstance(values, dict) or not {"data", "model", "diffusion"} <= set(values):
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(
            f" {path}: expected the sections data, model and diffusion of the pixel family, found {found}",
            field="config",
        )
    try:
        return _parse(path, values)
    except ConfigError as error:
        raise ConfigError(f" {path}: {error}", field="config") from None


def _parse(path: Path, values: dict[str, Any]) -> PixelConfig:
    """Make and validate the configuration from the content of a file."""
    names = ("data", "model", "diffusion", "sampling", "training")
    check_names(values, [*names, *IGNORED_SECTIONS], "of the file")
    sections = {name: values.get(name) or {} for name in names}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"section {name}: expected settings, found {section!r}")
    data, model, sampling = sections["data"], sections["model"], sections["sampling"]
    check_names(data, [*DATA, *DATA_VALUES], "data")
    check_names(sampling, SAMPLING, "sampling")
    check_names(sections["training"], [*TRAINING, *(field.name for field in fields(TrainingConfig))], "training")
    for name, expected in DATA_VALUES.items():
        if data.get(name, expected) is not expected:
            raise ConfigError(f"data.{name} {data[name]!r}: expected {str(expected).lower()}")
    diffusion = diffusion_config_from_dict(sections["diffusion"])
    if model.get("type", "simple") != "simple":
        raise ConfigError(f"model.type {model['type']!r}: expected simple")
    network = model_config_from_dict({"image_size": data.get("image_size"), **model}, MODEL)
    if data.get("channels", network.in_channels) != network.in_channels:
        raise ConfigError(
            f"data.channels {data['channels']!r}: expected {network.in_channels}, the model's in_channels"
        )
    batch_size = typed(sampling.get("batch_size", 64), int, "sampling.batch_size")
    if batch_size < 1:
        raise ConfigError(f"sampling.batch_size {batch_size}: expected at least 1")
    return PixelConfig(
        path=path,
        model=network,
        diffusion=diffusion,
        batch_size=batch_size,
        pretrained=typed(model.get("pretrained"), str | None, "model.pretrained") or _public_model(data),
        training=sections["training"],
    )


def diffusion_config_from_dict(values: dict[str, Any]) -> DiffusionConfig:
    """Make and validate the forward process.

    Raises:
        ConfigError: a setting is unknown or cannot work.
    """
    config = fill(DiffusionConfig, values, "diffusion")
    if config.beta_schedule != "linear":
        raise ConfigError(f"diffusion.beta_schedule {config.beta_schedule!r}: expected linear")
    if config.parameterization not in PREDICTIONS:
        raise ConfigError(
            f"diffusion.parameterization {config.parameterization!r}: expected one of {', '.join(PREDICTIONS)}"
        )
    start, end = config.beta_start, config.beta_end
    if not 0 < start <= end < 1:
        raise ConfigError(f"diffusion.beta_start {start:g}, beta_end {end:g}: expected 0 < start <= end < 1")
    if config.num_diffusion_timesteps < 1:
        raise ConfigError(f"diffusion.num_diffusion_timesteps {config.num_diffusion_timesteps}: expected at least 1")
    return config


def training_config(values: dict[str, Any]) -> TrainingConfig:
    """Make a TrainingConfig from the `training` section of a YAML file.

    Raises:
        ConfigError: a setting is unknown or of another type.
    """
    return fill(TrainingConfig, values, "training")


def _public_model(data: dict[str, Any]) -> str | None:
    """Return the name of the public checkpoint of this data set, if there is one."""
    if data.get("dataset") == "LSUN":
        return f"ema_lsun_{str(data.get('category', '')).removesuffix('_outdoor')}"
    return PUBLIC_MODELS.get(str(data.get("dataset")))
