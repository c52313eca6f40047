"""The UNet of the latent family (Rombach et al. 2022, arXiv 2112.10752), with the released parameter names."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.attention import AttentionBlock, SpatialTransformer
from qdiff.errors import ConfigError
from qdiff.utils.settings import fill


@dataclass(frozen=True)
class UNetConfig:
    """The UNet: `unet_config.params` of a YAML file.

    Attributes:
        in_channels: channels of the latents.
        out_channels: channels of the output.
        model_channels: width of the first layer, a multiple of `norm_groups`.
        attention_resolutions: the downsampling factors at which attention follows each residual block.
        num_res_blocks: residual blocks of each resolution; the upward path has one more.
        channel_mult: width of each resolution, as a multiple of `model_channels`.
        dropout: probability of dropout in training, 0 to 1.
        num_heads: number of attention heads, one for each resolution or the same for all; -1 if `num_head_channels`
            decides.
        num_head_channels: channels of a head, or -1 if `num_heads` decides.
        use_scale_shift_norm: whether the time embedding scales and shifts the features instead of being added to them.
        resblock_updown: whether residual blocks change the resolution instead of convolutions.
        use_spatial_transformer: whether attention is a transformer with a context.
        transformer_depth: transformer blocks of each spatial transformer.
        context_dim: width D of the contexts. None without a spatial transformer.
        norm_groups: groups of the normalizations, a setting of ours. The published models have 32.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    attention_resolutions: tuple[int, ...]
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    dropout: float = 0.0
    num_heads: int | tuple[int, ...] = -1
    num_head_channels: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    norm_groups: int = 32

    def heads(self, level: int) -> int:
        """Return the number of attention heads of a layer at a resolution, counted from the highest one, 0."""
        if self.num_head_channels != -1:
            return self.model_channels * self.channel_mult[level] // self.num_head_channels
        return self.num_heads[level] if isinstance(self.num_heads, tuple) else self.num_heads


IGNORED = ("image_size", "use_checkpoint", "legacy")  # published settings that change nothing here


def unet_config(values: dict[str, Any]) -> UNetConfig:
    """Make and validate a UNetConfig.

    Args:
        values: the settings; lists become tuples.

    Raises:
        ConfigError: a setting is missing, unknown or cannot work.
    """
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
    _validate_heads(config)
    if config.model_channels % config.norm_groups:
        raise ConfigError(
            f"model_channels {config.model_channels}: "
            f"expected a multiple of the {config.norm_groups} groups of the norms"
        )
    for level, mult in enumerate(config.channel_mult):
        channels, heads = config.model_channels * mult, config.heads(level)
        if heads < 1 or channels % heads:
            raise ConfigError(f"unet_config.params: {channels} channels cannot be split into {heads} heads")
    return config


def _validate_heads(config: UNetConfig) -> None:
    """Check that one of the two settings decides the number of attention heads."""
    per_level = config.num_heads if isinstance(config.num_heads, tuple) else (config.num_heads,)
    if isinstance(config.num_heads, tuple) and len(per_level) != len(config.channel_mult):
        raise ConfigError(
            f"unet_config.params.num_heads {list(per_level)}: expected one number for each of the "
            f"{len(config.channel_mult)} resolutions"
        )
    settings = (*per_level, config.num_head_channels)
    if 0 in settings or min(settings) < -1:
        raise ConfigError(
            f"unet_config.params: num_heads {config.num_heads}, num_head_channels {config.num_head_channels}: "
            "expected 1 or more"
        )
    if -1 in per_level and config.num_head_channels == -1:
        raise ConfigError("unet_config.params: expected num_heads or num_head_channels")


def frequencies(half: int) -> Tensor:
    """Return exp(-ln(10000) i / half) for i = 0 to half - 1, float32 [half], on the CPU.

    The order of the operations is that of the published code; it decides the last bits.
    """
    return torch.exp((-math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu")) / half)


_FREQUENCIES: dict[tuple[int, torch.device], Tensor] = {}


def _frequencies_on(half: int, device: torch.device) -> Tensor:
    """`frequencies` on a device; on GPUs they are copied once, because the CPU waits for each copy."""
    if device.type != "cuda" or torch.compiler.is_compiling():  # tracing must not leave its tensors behind
        return frequencies(half).to(device)
    if (half, device) not in _FREQUENCIES:
        _FREQUENCIES[half, device] = frequencies(half).to(device)
    return _FREQUENCIES[half, device]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed time steps as [cos, sin] of `dim // 2` frequencies (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    Args:
        t: time steps, [N].
        dim: width of the embedding.

    Returns:
        The embedding, float32 [N, dim].
    """
    angles = t.float()[:, None] * _frequencies_on(dim // 2, t.device)[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class Downsample(nn.Module):
    """Halve the resolution by a 3x3 convolution of stride 2 with symmetric padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution by the nearest neighbor and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """A residual block with a time embedding, which is added to the features or scales and shifts them.

    Args:
        config: the configuration of the UNet.
        in_channels: channels of the input.
        out_channels: channels of the output. If they differ from the input's, a 1x1 convolution is the shortcut.
        resample: "up" doubles the resolution, "down" halves it.
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, resample: str = "") -> None:
        super().__init__()
        self.out_channels = out_channels
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
        """Map `x` [N, in_channels, H, W] and the time embedding `emb` [N, 4 model_channels] to the output."""
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
    """The network of the latent family, which predicts the noise eps(z_t, t) or eps(z_t, t, context).

    Args:
        config: the settings of a YAML file.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        ch, widths = config.model_channels, [config.model_channels * m for m in config.channel_mult]
        self.time_embed = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, ch, 3, padding=1)])])
        skips, current = [ch], ch
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(nn.ModuleList([ResBlock(config, current, width), *self._attention(level)]))
                current = width
                skips.append(current)
            if level + 1 < len(widths):
                down = ResBlock(config, current, current, "down") if config.resblock_updown else Downsample(current)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(current)

        middle = self._make_attention(len(widths) - 1)
        self.middle_block = nn.ModuleList(
            [ResBlock(config, current, current), middle, ResBlock(config, current, current)]
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(config.num_res_blocks + 1):
                layers: list[nn.Module] = [
                    ResBlock(config, current + skips.pop(), width),
                    *self._attention(level),
                ]
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

    def _attention(self, level: int) -> list[nn.Module]:
        return [self._make_attention(level)] if 2**level in self.config.attention_resolutions else []

    def _make_attention(self, level: int) -> nn.Module:
        c = self.config
        channels, heads = c.model_channels * c.channel_mult[level], c.heads(level)
        if c.use_spatial_transformer:
            return SpatialTransformer(channels, heads, c.transformer_depth, c.context_dim, c.norm_groups)
        return AttentionBlock(channels, heads, c.norm_groups)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict the noise in a batch.

        Args:
            x: noisy latents, [N, C, h, w].
            t: time steps, [N], from 0 to the last time step of the model. Fractions are allowed.
            context: contexts, [N, L, context_dim], of a conditional model.

        Returns:
            The noise (or what else the model predicts, see `qdiff.prediction`), of the shape of `x`.
        """
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        h, skips = x, []
        for layers in self.input_blocks:
            h = _run(layers, h, emb, context)
            skips.append(h)
        h = _run(self.middle_block, h, emb, context)
        for layers in self.output_blocks:
            h = _run(layers, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


def _run(layers: nn.Module, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
    """Run the layers of one `nn.ModuleList`, each with the inputs that it takes."""
    for layer in cast(nn.ModuleList, layers):
        if isinstance(layer, ResBlock):
            h = layer(h, emb)
        elif isinstance(layer, SpatialTransformer):
            h = layer(h, context)
        else:
            h = layer(h)
    return h
