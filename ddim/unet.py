"""The UNet of the pixel family (Ho et al. 2020, arXiv 2006.11239), with the released parameter names.

Every name and shape here is fixed by the public checkpoints. The two products of the attention are
modules of their own (`qk`, `av`; no parameters), so that quantization can replace them by type. The
blocks serve the autoencoders of the latent family too.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.config import ModelConfig
from qdiff.layers import MatMul, fused_attention


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [sin, cos] of `t` [N] -> [N, dim], always formed in float32, in this order."""
    half = dim // 2
    rate = -(math.log(10000) / (half - 1))
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * rate)
    angles = t.float()[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Downsample(nn.Module):
    """Halve the resolution: pad right and bottom by one, 3x3 convolution of stride 2."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResnetBlock(nn.Module):
    """Residual block: norm, swish, conv, + time projection, norm, swish, dropout, conv, + shortcut.

    With `temb_channels` 0 there is no time projection (the blocks of an autoencoder).
    """

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
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
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels, q, k, v and proj_out being 1x1 convolutions."""

    fused = False

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
        scale, width = x.shape[1] ** -0.5, x.shape[3]
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "n c h w -> n c (h w)") for layer in (self.q, self.k, self.v))
        if self.fused:
            h = fused_attention(*(rearrange(part, "n c t -> n t c") for part in (q, k, v)), scale)
            return x + self.proj_out(rearrange(h, "n (h w) c -> n c h w", w=width))
        logits = self.qk(rearrange(q, "n c t -> n t c"), k) * scale  # [N, HW (query), HW (key)]
        probabilities = torch.softmax(logits, dim=2)
        h = self.av(v, rearrange(probabilities, "n query key -> n key query"))
        return x + self.proj_out(rearrange(h, "n c (h w) -> n c h w", w=width))


class UNet(nn.Module):
    """Noise-prediction network eps(x_t, t) of the pixel family.

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

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb_channels), nn.Linear(temb_channels, temb_channels)])
        self.conv_in = nn.Conv2d(config.in_channels, ch, 3, padding=1)

        skips, current = [ch], ch
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            level = make_level()
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

        self.mid = nn.Module()
        self.mid.block_1 = block(current, current)
        self.mid.attn_1 = AttnBlock(current, groups)
        self.mid.block_2 = block(current, current)

        up = []
        for index in reversed(range(len(widths))):
            level = make_level()
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
        """Predict the noise in `x` [N, C, H, W] at time steps `t` [N] (0 to 999); the shape of `x`."""
        temb = timestep_embedding(t, self.config.ch).to(x.dtype)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))

        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for index, block in enumerate(level.block):
                h = block(h, temb)
                h = level.attn[index](h) if level.attn else h
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)

        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)

        for level in reversed(self.up):
            for index, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[index](h) if level.attn else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def make_level() -> nn.Module:
    """One resolution of the UNet: its residual blocks and the attention after each (or none)."""
    level = nn.Module()
    level.block = nn.ModuleList()
    level.attn = nn.ModuleList()
    return level
