"""The YAML configuration of the pixel family, checked when it is read."""

from dataclasses import dataclass


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
