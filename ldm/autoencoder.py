"""First stages, which map between images and latents: the KL and VQ autoencoders, with the released parameter names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.unet import AttnBlock, Downsample, Level, Middle, ResnetBlock, Upsample, group_norm, levels_of
from qdiff.errors import ConfigError
from qdiff.utils.settings import fill


@dataclass(frozen=True)
class AutoencoderConfig:
    """The networks of an autoencoder: `ddconfig` of a YAML file.

    Attributes:
        z_channels: channels of the features between encoder and decoder.
        resolution: width and height of the images in pixels.
        in_channels: channels of the images.
        out_ch: channels of the decoded images.
        ch: width of the first layer.
        ch_mult: width of each resolution, as a multiple of `ch`.
        num_res_blocks: residual blocks of each resolution of the encoder; the decoder has one more.
        attn_resolutions: the image sizes at which attention follows each residual block.
        double_z: whether the encoder has twice as many output channels, for means and log-variances.
        dropout: probability of dropout in training, 0 to 1.
        norm_groups: groups of the normalizations, a setting of ours. The published models have 32.
    """

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


def _middle(channels: int, config: AutoencoderConfig) -> Middle:
    return Middle(channels, 0, config.dropout, config.norm_groups)


def _make_level(in_channels: int, index: int, count: int, config: AutoencoderConfig) -> Level:
    """Make the residual blocks, and the attention, of resolution `index`; `count` is the number of blocks."""
    level, current = Level(), in_channels
    width, size = config.ch * config.ch_mult[index], config.resolution // 2**index
    for _ in range(count):
        level.block.append(ResnetBlock(current, width, 0, config.dropout, config.norm_groups))
        current = width
        if size in config.attn_resolutions:
            level.attn.append(AttnBlock(width, config.norm_groups))
    return level


def _run_level(level: Level, h: Tensor) -> Tensor:
    for index, block in enumerate(level.block):
        h = block(h)
        h = level.attn[index](h) if level.attn else h
    return h


class Encoder(nn.Module):
    """The network from images to features.

    Args:
        config: its sizes.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        current = config.ch
        self.conv_in = nn.Conv2d(config.in_channels, current, 3, padding=1)
        self.down = nn.ModuleList()
        for index, mult in enumerate(config.ch_mult):
            level = _make_level(current, index, config.num_res_blocks, config)
            current = config.ch * mult
            if index + 1 < len(config.ch_mult):
                level.downsample = Downsample(current, with_conv=True)
            self.down.append(level)
        self.mid = _middle(current, config)
        self.norm_out = group_norm(current, config.norm_groups)
        self.conv_out = nn.Conv2d(current, config.z_channels * (2 if config.double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to features [N, z_channels (twice as many with `double_z`), h, w]."""
        h = self.conv_in(x)
        for level in levels_of(self.down):
            h = _run_level(level, h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """The network from features to images.

    Args:
        config: its sizes.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        current = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, current, 3, padding=1)
        self.mid = _middle(current, config)
        up: list[Level] = []
        for index, mult in reversed(list(enumerate(config.ch_mult))):
            level = _make_level(current, index, config.num_res_blocks + 1, config)
            current = config.ch * mult
            if index:
                level.upsample = Upsample(current, with_conv=True)
            up.insert(0, level)
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(current, config.norm_groups)
        self.conv_out = nn.Conv2d(current, config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map features [N, z_channels, h, w] to images [N, out_ch, H, W], about [-1, 1]."""
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(levels_of(self.up)):
            h = _run_level(level, h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


class FirstStage(nn.Module):
    """A map between images and latents."""

    def encode(self, images: Tensor) -> Tensor:
        """Map images [N, C, H, W], in [-1, 1], to latents [N, embed_dim, h, w]."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Map latents [N, embed_dim, h, w] to images [N, C, H, W], about [-1, 1]."""
        raise NotImplementedError


class Autoencoder(FirstStage):
    """What both autoencoders share: encoder, decoder, and a 1x1 convolution beside each.

    Args:
        embed_dim: channels of the latents.
        ddconfig: the settings of an `AutoencoderConfig`.

    Raises:
        ConfigError: a setting is missing, unknown or cannot work.
    """

    doubles = False  # whether the encoder must have twice as many output channels

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


class AutoencoderKL(Autoencoder):
    """The autoencoder with a Gaussian posterior (Rombach et al. 2022, arXiv 2112.10752, section 3.1).

    Args:
        embed_dim: channels of the latents.
        ddconfig: the settings of an `AutoencoderConfig`.
        lossconfig: ignored; only the published training reads it.
        monitor: ignored likewise.
    """

    doubles = True

    def __init__(self, embed_dim: int, ddconfig: dict[str, Any], lossconfig: object = None, monitor: str = "") -> None:
        super().__init__(embed_dim, ddconfig)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z given images [N, C, H, W] in [-1, 1], each [N, embed_dim, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def encode(self, images: Tensor) -> Tensor:
        """Return the mean of the posterior; see `FirstStage.encode`."""
        return self.posterior(images)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Decode; see `FirstStage.decode`."""
        return self.decoder(self.post_quant_conv(z))


class Codebook(nn.Module):
    """The codebook of a VQ autoencoder (van den Oord et al. 2017, arXiv 1711.00937, eq. 1 and 2).

    Args:
        n_embed: number of entries.
        embed_dim: channels of an entry.
    """

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Replace each pixel of `z` [N, embed_dim, h, w] by the nearest entry of the codebook."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        codes = self.embedding.weight
        distance = codes.square().sum(1) - 2 * flat @ codes.T
        return codes[distance.argmin(1)].reshape(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)


class VQModel(Autoencoder):
    """The autoencoder with a codebook.

    Args:
        embed_dim: channels of the latents.
        n_embed: number of entries of the codebook.
        ddconfig: the settings of an `AutoencoderConfig`.
        lossconfig: ignored; only the published training reads it.
        monitor: ignored likewise.
    """

    def __init__(
        self, embed_dim: int, n_embed: int, ddconfig: dict[str, Any], lossconfig: object = None, monitor: str = ""
    ) -> None:
        super().__init__(embed_dim, ddconfig)
        self.quantize = Codebook(n_embed, embed_dim)

    def encode(self, images: Tensor) -> Tensor:
        """Encode; see `FirstStage.encode`. The latents are not quantized yet."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        """Quantize the latents and decode them; see `FirstStage.decode`."""
        return self.decoder(self.post_quant_conv(self.quantize(z)))


class IdentityFirstStage(FirstStage):
    """No autoencoder: the latents are the images.

    Args:
        vq_interface: ignored; accepted for the published files.
    """

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()

    def encode(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def decode(self, z: Tensor) -> Tensor:
        """Return the latents."""
        return z
