"""Attentions as people write them: their matmuls are function calls."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from qdiff.layers import MatMul


class EinsumAttention(nn.Module):
    """guided-diffusion's `QKVAttentionLegacy`: queries and keys are scaled before their product."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        channels = width // (3 * self.heads)
        q, k, v = qkv.reshape(n * self.heads, channels * 3, length).split(channels, dim=1)
        scale = 1 / math.sqrt(math.sqrt(channels))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, length)


class ExplicitAttention(EinsumAttention):
    """The same with matmuls that are modules."""

    def __init__(self, heads):
        super().__init__(heads)
        self.qk, self.wv = MatMul(), MatMul()

    def forward(self, qkv):
        n, width, length = qkv.shape
        channels = width // (3 * self.heads)
        q, k, v = qkv.reshape(n * self.heads, channels * 3, length).split(channels, dim=1)
        scale = 1 / math.sqrt(math.sqrt(channels))
        weight = torch.softmax(self.qk((q * scale).transpose(1, 2), k * scale), dim=-1)
        return self.wv(weight, v.transpose(1, 2)).transpose(1, 2).reshape(n, -1, length)


class AttentionBlock(nn.Module):
    """guided-diffusion's residual attention over the pixels."""

    def __init__(self, width, heads=2, attention=EinsumAttention):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, width), nn.Conv1d(width, 3 * width, 1)
        self.attention, self.proj_out = attention(heads), nn.Conv1d(width, width, 1)

    def forward(self, x):
        flat = x.reshape(*x.shape[:2], -1)
        return (flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))).reshape(x.shape)


class ResBlock(nn.Module):
    """guided-diffusion's residual block with a scale and a shift from the time embedding."""

    def __init__(self, width, out, emb):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(4, out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(x) + h


class Sequence(nn.Sequential):
    """guided-diffusion's `TimestepEmbedSequential`."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class GuidedUNet(nn.Module):
    """A small network as guided-diffusion writes it: 4 attentions (8 matmuls) and 4 concatenations."""

    def __init__(self, width=8, attention=EinsumAttention):
        super().__init__()
        self.width, emb = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def blocks(channels, out):
            return Sequence(ResBlock(channels, out, emb), AttentionBlock(out, attention=attention))

        self.input_blocks = nn.ModuleList(
            [Sequence(nn.Conv2d(3, width, 3, padding=1)), Sequence(ResBlock(width, width, emb))]
        )
        self.input_blocks += [Sequence(nn.Conv2d(width, width, 3, stride=2, padding=1)), blocks(width, 2 * width)]
        self.middle_block = Sequence(
            ResBlock(2 * width, 2 * width, emb),
            AttentionBlock(2 * width, attention=attention),
            ResBlock(2 * width, 2 * width, emb),
        )
        self.output_blocks = nn.ModuleList([blocks(4 * width, 2 * width), blocks(3 * width, width)])
        self.output_blocks += [Sequence(ResBlock(2 * width, width, emb)) for _ in range(2)]
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x, t):
        angles = t[:, None] * torch.exp(-torch.arange(self.width // 2) / 2)
        emb = self.time_embed(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))
        skips, h = [], x
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for number, module in enumerate(self.output_blocks):
            h = module(torch.cat([h, skips.pop()], dim=1), emb)
            h = F.interpolate(h, scale_factor=2, mode="nearest") if number == 1 else h
        return self.out(h)


class FusedAttention(nn.Module):
    """Attention to a context by PyTorch's operator, with a mask, as in diffusers."""

    def __init__(self, width, heads=2, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        parts = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.to_out(h.transpose(1, 2).flatten(2))


class BmmAttention(nn.Module):
    """CompVis's attention over the pixels with a single head."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        w = torch.bmm(q.permute(0, 2, 1), k) * q.shape[1] ** -0.5
        w = F.softmax(w, dim=2).permute(0, 2, 1)
        return x + self.proj_out(torch.bmm(v, w).reshape(x.shape))
