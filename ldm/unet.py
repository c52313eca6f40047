"""The UNet of the latent family (Rombach et al. 2022, arXiv 2112.10752), with the released parameter names."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.attention import AttentionBlock, SpatialTransformer
from qdiff.config import fill
from qdiff.errors import ConfigError


@dataclass(frozen=True)
class UNetConfig:
    """`unet_config.params` of a YAML file.

    attention_resolutions are downsampling factors. num_head_channels -1: num_heads heads, else
    channels // num_head_channels of them. norm_groups is ours (the published models have 32).
    """

    in_channels: int
    out_channels: int
    model_channels: int
    attention_resolutions: tuple[int, ...]
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    dropout: float = 0.0
    num_heads: int = -1
    num_head_channels: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    norm_groups: int = 32

    def heads(self, channels: int) -> int:
        return self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels


IGNORED = ("image_size", "use_checkpoint", "legacy")  # published settings that change nothing here


def unet_config(values: dict[str, Any]) -> UNetConfig:
    """Build and check a UNetConfig; ConfigError names what is missing, unknown or cannot work."""
    config = fill(UNetConfig, values, "unet_config.params", IGNORED)
    for name in ("in_channels", "out_channels", "model_channels", "num_res_blocks", "norm_groups", "transformer_depth"):
        if getattr(config, name) < 1:
            raise ConfigError(f"unet_config.params.{name} {getattr(config, name)}: expected at least 1")
    if not config.channel_mult or min(config.channel_mult) < 1:
        raise ConfigError(
            f"unet_config.params.channel_mult {list(config.channel_mult)}: expected numbers of at least 1"
        )
    if (config.context_dim is not None) != config.use_spatial_transformer:
        raise ConfigError("unet_config.params: expected use_spatial_transformer and context_dim together, or neither")
    if 0 in (config.num_heads, config.num_head_channels) or min(config.num_heads, config.num_head_channels) < -1:
        raise ConfigError(
            f"unet_config.params: num_heads {config.num_heads}, num_head_channels {config.num_head_channels}: expected 1 or more"
        )
    if config.num_heads == -1 and config.num_head_channels == -1:
        raise ConfigError("unet_config.params: expected num_heads or num_head_channels")
    if config.model_channels % config.norm_groups:
        raise ConfigError(
            f"model_channels {config.model_channels}: expected a multiple of the {config.norm_groups} groups of the norms"
        )
    for mult in config.channel_mult:
        heads = config.heads(config.model_channels * mult)
        if heads < 1 or config.model_channels * mult % heads:
            raise ConfigError(
                f"unet_config.params: {config.model_channels * mult} channels cannot be split into {heads} heads"
            )
    return config


def frequencies(half: int) -> Tensor:
    """exp(-ln(10000) i / half), i = 0 to half - 1, in float32 in this order, on the CPU."""
    return torch.exp((-math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu")) / half)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [cos, sin] of `t` [N] -> [N, dim], always formed in float32."""
    angles = t.float()[:, None] * frequencies(dim // 2).to(t.device)[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class Downsample(nn.Module):
    """Halve the resolution: 3x3 convolution of stride 2 with symmetric padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Residual block with a time embedding, added or as scale and shift; `resample` "up" or "down" changes the size."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, resample: str = "") -> None:
        super().__init__()
        groups, embedding = config.norm_groups, 4 * config.model_channels
        self.scale_shift, self.resample = config.use_scale_shift_norm, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels, eps=1e-5), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels * (2 if self.scale_shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def _resize(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self._resize(self.in_layers[1](self.in_layers[0](x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[3](self.out_layers[2](self.out_layers[1](h)))
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self._resize(x)) + h


class UNetModel(nn.Module):
    """Noise-prediction network eps(z_t, t[, context]) of the latent family."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        ch, widths = config.model_channels, [config.model_channels * m for m in config.channel_mult]
        self.time_embed = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, ch, 3, padding=1)])])
        skips, current = [ch], ch
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(
                    nn.ModuleList([ResBlock(config, current, width), *self._attention(width, 2**level)])
                )
                current = width
                skips.append(current)
            if level + 1 < len(widths):
                down = ResBlock(config, current, current, "down") if config.resblock_updown else Downsample(current)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(current)

        middle = self._make_attention(current)
        self.middle_block = nn.ModuleList(
            [ResBlock(config, current, current), middle, ResBlock(config, current, current)]
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(config.num_res_blocks + 1):
                layers = [ResBlock(config, current + skips.pop(), width), *self._attention(width, 2**level)]
                current = width
                if level and index == config.num_res_blocks:
                    layers.append(
                        ResBlock(config, current, current, "up") if config.resblock_updown else Upsample(current)
                    )
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, current, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(current, config.out_channels, 3, padding=1),
        )

    def _attention(self, channels: int, factor: int) -> list[nn.Module]:
        return [self._make_attention(channels)] if factor in self.config.attention_resolutions else []

    def _make_attention(self, channels: int) -> nn.Module:
        c = self.config
        if c.use_spatial_transformer:
            return SpatialTransformer(channels, c.heads(channels), c.transformer_depth, c.context_dim, c.norm_groups)
        return AttentionBlock(channels, c.heads(channels), c.norm_groups)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict the noise in `x` [N, C, H, W] at times `t` [N] given `context` [N, L, context_dim]; the shape of `x`."""
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        h, skips = x, []
        for layers in self.input_blocks:
            h = _run(layers, h, emb, context)
            skips.append(h)
        h = _run(self.middle_block, h, emb, context)
        for layers in self.output_blocks:
            h = _run(layers, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


def _run(layers: nn.ModuleList, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
    for layer in layers:
        if isinstance(layer, ResBlock):
            h = layer(h, emb)
        elif isinstance(layer, SpatialTransformer):
            h = layer(h, context)
        else:
            h = layer(h)
    return h
