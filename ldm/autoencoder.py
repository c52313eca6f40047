"""First stages: the KL and VQ autoencoders between images and latents, with the released parameter names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.unet import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm, make_level
from qdiff.config import fill
from qdiff.errors import ConfigError


@dataclass(frozen=True)
class AutoencoderConfig:
    """`ddconfig` of a YAML file. attn_resolutions are true sizes; norm_groups is ours (published: 32)."""

    z_channels: int
    resolution: int
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...] = ()
    double_z: bool = True
    dropout: float = 0.0
    norm_groups: int = 32


def _middle(channels: int, config: AutoencoderConfig) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, 0, config.dropout, config.norm_groups)
    mid.attn_1 = AttnBlock(channels, config.norm_groups)
    mid.block_2 = ResnetBlock(channels, channels, 0, config.dropout, config.norm_groups)
    return mid


def _run_level(level: nn.Module, h: Tensor) -> Tensor:
    for index, block in enumerate(level.block):
        h = block(h)
        h = level.attn[index](h) if level.attn else h
    return h


def _fill_level(level: nn.Module, count: int, current: int, width: int, size: int, config: AutoencoderConfig) -> None:
    for _ in range(count):
        level.block.append(ResnetBlock(current, width, 0, config.dropout, config.norm_groups))
        current = width
        if size in config.attn_resolutions:
            level.attn.append(AttnBlock(width, config.norm_groups))


class Encoder(nn.Module):
    """Images [N, in_channels, H, W] to features [N, z_channels (x 2 with double_z), h, w]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        current = config.ch
        self.conv_in = nn.Conv2d(config.in_channels, current, 3, padding=1)
        self.down = nn.ModuleList()
        for index, mult in enumerate(config.ch_mult):
            level, width = make_level(), config.ch * mult
            _fill_level(level, config.num_res_blocks, current, width, config.resolution // 2**index, config)
            current = width
            if index + 1 < len(config.ch_mult):
                level.downsample = Downsample(current, with_conv=True)
            self.down.append(level)
        self.mid = _middle(current, config)
        self.norm_out = group_norm(current, config.norm_groups)
        self.conv_out = nn.Conv2d(current, config.z_channels * (2 if config.double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = _run_level(level, h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features [N, z_channels, h, w] to images [N, out_ch, H, W], about [-1, 1]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        current = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, current, 3, padding=1)
        self.mid = _middle(current, config)
        up = []
        for index, mult in reversed(list(enumerate(config.ch_mult))):
            level, width = make_level(), config.ch * mult
            _fill_level(level, config.num_res_blocks + 1, current, width, config.resolution // 2**index, config)
            current = width
            if index:
                level.upsample = Upsample(current, with_conv=True)
            up.insert(0, level)
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(current, config.norm_groups)
        self.conv_out = nn.Conv2d(current, config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            h = _run_level(level, h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


class FirstStage(nn.Module):
    """What both autoencoders share. `config` holds `embed_dim` and the rest of the YAML's `params`."""

    def __init__(self, embed_dim: int, ddconfig: dict[str, Any]) -> None:
        super().__init__()
        self.config = fill(AutoencoderConfig, ddconfig, "ddconfig")
        if self.config.double_z != self.doubles:
            raise ConfigError(f"ddconfig.double_z {self.config.double_z}: {type(self).__name__} expects {self.doubles}")
        factor = 2 if self.doubles else 1
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv2d(factor * self.config.z_channels, factor * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, self.config.z_channels, 1)

    doubles = False

    @property
    def factor(self) -> int:
        """Pixels of the image per latent pixel, in one direction."""
        return 2 ** (len(self.config.ch_mult) - 1)


class AutoencoderKL(FirstStage):
    """Autoencoder with a Gaussian posterior (Rombach et al. 2022, section 3.1)."""

    doubles = True

    def __init__(self, embed_dim: int, ddconfig: dict[str, Any], lossconfig: object = None, monitor: str = "") -> None:
        super().__init__(embed_dim, ddconfig)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z given `images` [N, C, H, W] in [-1, 1], each [N, embed_dim, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def encode(self, images: Tensor) -> Tensor:
        """The mean of the posterior."""
        return self.posterior(images)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class VQModel(FirstStage):
    """Autoencoder with a codebook; `encode` returns the value before quantization, `decode` quantizes first."""

    def __init__(
        self, embed_dim: int, n_embed: int, ddconfig: dict[str, Any], lossconfig: object = None, monitor: str = ""
    ) -> None:
        super().__init__(embed_dim, ddconfig)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(n_embed, embed_dim)

    def encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def nearest_code(self, z: Tensor) -> Tensor:
        """The codebook entry nearest to each pixel of `z` [N, embed_dim, h, w]."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        codes = self.quantize.embedding.weight
        distance = codes.square().sum(1) - 2 * flat @ codes.T
        return codes[distance.argmin(1)].reshape(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.nearest_code(z)))


class IdentityFirstStage(nn.Module):
    """No autoencoder: the latents are the images."""

    factor = 1

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, z: Tensor) -> Tensor:
        return z
