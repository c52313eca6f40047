"""The UNet of the pixel family (Ho et al. 2020, arXiv 2006.11239), with the released parameter names.

The public checkpoints fix every name and shape here. The two attention matmuls are modules of their own (`qk` and `av`,
without parameters), so that quantization can replace them by type. The autoencoders of the latent family use the same
blocks.
"""

import math
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.config import ModelConfig
from qdiff.layers import AttentionCore, MatMul, attend_sparingly


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed time steps as [sin, cos] of `dim // 2` frequencies (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    The order of the operations, all in float32, is that of the published code; it decides the last bits.

    Args:
        t: time steps, [N].
        dim: width of the embedding.

    Returns:
        The embedding, float32 [N, dim].
    """
    half = dim // 2
    rate = -(math.log(10000) / (half - 1))
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * rate)
    angles = t.float()[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Make a group normalization with the epsilon of the published networks."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Downsample(nn.Module):
    """Halve the resolution by a 3x3 convolution of stride 2, after padding right and bottom by one pixel.

    Args:
        channels: channels of the input and output.
        with_conv: False averages 2x2 pixels instead.
    """

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by the nearest neighbor and a 3x3 convolution.

    Args:
        channels: channels of the input and output.
        with_conv: False leaves the convolution out.
    """

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResnetBlock(nn.Module):
    """A residual block: norm, SiLU, conv, plus time projection, norm, SiLU, dropout, conv, plus shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output. If they differ from the input's, a 1x1 convolution is the shortcut.
        temb_channels: width of the time embedding. The blocks of an autoencoder have none (0).
        dropout: probability of dropout, 0 to 1.
        groups: groups of the normalizations.
    """

    temb_proj: nn.Module
    nin_shortcut: nn.Module

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map `x` [N, in_channels, H, W] and `temb` [N, temb_channels] to [N, out_channels, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h


class AttnBlock(nn.Module):
    """Residual self-attention over the pixels, with one head. q, k, v and proj_out are 1x1 convolutions.

    Args:
        channels: channels of the input and output.
        groups: groups of the normalization.
    """

    core: AttentionCore | None = None  # engines set it: what computes the whole attention

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.qk = MatMul()
        self.av = MatMul()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, C, H, W] to the same shape."""
        h, width = self.norm(x), x.shape[3]
        q, k, v = (rearrange(layer(h), "n c h w -> n c (h w)") for layer in (self.q, self.k, self.v))
        if self.core is not None:
            q, k, v = (rearrange(part, "n c t -> n t 1 c") for part in (q, k, v))
            h = self.core(q, k, v, q.shape[3] ** -0.5, 1.0)
            return x + self.proj_out(rearrange(h, "n (h w) 1 c -> n c h w", w=width))
        h = attend_sparingly(self._attend, q, k, v)
        return x + self.proj_out(rearrange(h, "n c (h w) -> n c h w", w=width))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = self.qk(rearrange(q, "n c t -> n t c"), k) * q.shape[1] ** -0.5  # [N, HW (query), HW (key)]
        probabilities = torch.softmax(logits, dim=2)
        return self.av(v, rearrange(probabilities, "n query key -> n key query"))


class TimeEmbedding(nn.Module):
    """The two linear layers of the time embedding, under their released names."""

    def __init__(self, channels: int, temb_channels: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(channels, temb_channels), nn.Linear(temb_channels, temb_channels)])


class Level(nn.Module):
    """One resolution of a network: its residual blocks and the attention after each, or no attention."""

    block: nn.ModuleList
    attn: nn.ModuleList
    downsample: nn.Module  # the last resolution has none
    upsample: nn.Module  # the first resolution has none

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()


def levels_of(levels: nn.ModuleList) -> list[Level]:
    """Return the resolutions of a network as what they are: `nn.ModuleList` does not know the type of its elements."""
    return cast(list[Level], list(levels))


class Middle(nn.Module):
    """The blocks at the lowest resolution, under their released names.

    Args:
        channels: channels of the input and output.
        temb_channels: width of the time embedding, or 0 in an autoencoder.
        dropout: probability of dropout, 0 to 1.
        groups: groups of the normalizations.
    """

    def __init__(self, channels: int, temb_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, temb_channels, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, temb_channels, dropout, groups)


class UNet(nn.Module):
    """The network of the pixel family, which predicts the noise eps(x_t, t).

    Args:
        config: the `model` section of a YAML file with the image size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        ch, groups = config.ch, config.norm_groups
        widths = [ch * m for m in config.ch_mult]
        sizes = [config.image_size // 2**level for level in range(len(widths))]
        temb_channels = 4 * ch

        def block(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, temb_channels, config.dropout, groups)

        self.temb = TimeEmbedding(ch, temb_channels)
        self.conv_in = nn.Conv2d(config.in_channels, ch, 3, padding=1)

        skips, current = [ch], ch
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level()
            for _ in range(config.num_res_blocks):
                level.block.append(block(current, width))
                current = width
                if sizes[index] in config.attn_resolutions:
                    level.attn.append(AttnBlock(width, groups))
                skips.append(current)
            if index + 1 < len(widths):
                level.downsample = Downsample(current, config.resamp_with_conv)
                skips.append(current)
            self.down.append(level)

        self.mid = Middle(current, temb_channels, config.dropout, groups)

        up: list[Level] = []
        for index in reversed(range(len(widths))):
            level = Level()
            for _ in range(config.num_res_blocks + 1):
                level.block.append(block(current + skips.pop(), widths[index]))
                current = widths[index]
                if sizes[index] in config.attn_resolutions:
                    level.attn.append(AttnBlock(current, groups))
            if index:
                level.upsample = Upsample(current, config.resamp_with_conv)
            up.insert(0, level)
        self.up = nn.ModuleList(up)
        self.norm_out = group_norm(current, groups)
        self.conv_out = nn.Conv2d(current, config.out_ch, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in a batch.

        Args:
            x: noisy images, [N, C, H, W].
            t: time steps, [N], from 0 to the last time step of the model. Fractions are allowed.

        Returns:
            The noise (or what else the model predicts, see `qdiff.prediction`), of the shape of `x`.
        """
        temb = timestep_embedding(t, self.config.ch).to(x.dtype)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))

        h = self.conv_in(x)
        skips = [h]
        for level in levels_of(self.down):
            for index, block in enumerate(level.block):
                h = block(h, temb)
                h = level.attn[index](h) if level.attn else h
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)

        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)

        for level in reversed(levels_of(self.up)):
            for index, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[index](h) if level.attn else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
