"""The two kinds of attention of the latent family: attention blocks with `qkv` convolutions, and transformer blocks."""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.layers import AttentionCore, MatMul, attend_sparingly

SLICE_BYTES = 2**28  # the largest matrix of attention probabilities that is in memory at a time


def sliced(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], matmuls: Sequence[nn.Module], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Compute `attend(q, k, v)` in slices of the batch whose attention probabilities fit into SLICE_BYTES.

    The result does not depend on the slices. If one of the matmuls needs the whole batch, the batch is not sliced.

    Args:
        attend: the attention of some batch entries.
        matmuls: the attention matmuls that `attend` calls.
        q: queries, [N x heads, T, d].
        k: keys, [N x heads, S, d].
        v: values, [N x heads, S, d].

    Returns:
        [N x heads, T, d].
    """
    bytes_per_entry = q.shape[1] * k.shape[1] * q.element_size()
    size = max(1, SLICE_BYTES // bytes_per_entry)
    if size >= len(q) or any(matmul.whole_batch for matmul in matmuls):
        return attend_sparingly(attend, q, k, v)
    slices = (slice(start, start + size) for start in range(0, len(q), size))
    return torch.cat([attend_sparingly(attend, q[part], k[part], v[part]) for part in slices])


class QKVAttention(nn.Module):
    """Attention whose queries, keys and values come in one tensor, in the "legacy" order: first heads, then q, k and v.

    q and k are each scaled by d^-1/4 before they are quantized.

    Args:
        heads: number of heads.
    """

    core: AttentionCore | None = None  # engines set it: what computes the whole attention

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_matmul = MatMul()
        self.smv_matmul = MatMul()

    def forward(self, qkv: Tensor) -> Tensor:
        """Map `qkv` [N, heads * 3 * d, T] to [N, heads * d, T]."""
        scale = (qkv.shape[1] // (3 * self.heads)) ** -0.25
        if self.core is not None:
            q, k, v = rearrange(qkv, "n (heads parts d) t -> parts n t heads d", heads=self.heads, parts=3)
            return rearrange(self.core(q, k, v, 1.0, scale), "n t heads d -> n (heads d) t")
        q, k, v = rearrange(qkv, "n (heads parts d) t -> parts (n heads) t d", heads=self.heads, parts=3)
        h = sliced(self._attend, (self.qkv_matmul, self.smv_matmul), q * scale, k * scale, v)
        return rearrange(h, "(n heads) t d -> n (heads d) t", heads=self.heads)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probabilities = torch.softmax(self.qkv_matmul(q, rearrange(k, "b t d -> b d t")), dim=-1)
        return self.smv_matmul(probabilities, v)


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels. `qkv` and `proj_out` are 1-D convolutions.

    Args:
        channels: channels of the input and output.
        heads: number of heads.
        groups: groups of the normalization.
    """

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(heads)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, C, H, W] to the same shape."""
        h = self.attention(self.qkv(self.norm(rearrange(x, "n c h w -> n c (h w)"))))
        return x + rearrange(self.proj_out(h), "n c (h w) -> n c h w", w=x.shape[3])


class CrossAttention(nn.Module):
    """Attention to a context, or self-attention. q and k are quantized before their product is scaled.

    Args:
        channels: width C of the input and output.
        heads: number of heads.
        context_dim: width D of the context. None means self-attention.
    """

    core: AttentionCore | None = None  # engines set it: what computes the whole attention

    def __init__(self, channels: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))
        self.qk = MatMul()
        self.av = MatMul()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map `x` [N, T, C] and `context` [N, L, D] (None: `x` itself) to [N, T, C]."""
        context = x if context is None else context
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        if self.core is not None:
            q, k, v = (rearrange(part, "n t (heads d) -> n t heads d", heads=self.heads) for part in parts)
            return self.to_out(rearrange(self.core(q, k, v, q.shape[3] ** -0.5, 1.0), "n t heads d -> n t (heads d)"))
        q, k, v = (rearrange(part, "n t (heads d) -> (n heads) t d", heads=self.heads) for part in parts)
        h = sliced(self._attend, (self.qk, self.av), q, k, v)
        return self.to_out(rearrange(h, "(n heads) t d -> n t (heads d)", heads=self.heads))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = self.qk(q, rearrange(k, "b t d -> b d t")) * q.shape[2] ** -0.5
        return self.av(torch.softmax(logits, dim=-1), v)


class GEGLU(nn.Module):
    """value * gelu(gate), both from one projection, with the exact GELU (Shazeer 2020, arXiv 2002.05202).

    Args:
        channels: width C of the input.
        inner: width of the output.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, T, C] to [N, T, inner]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The feed-forward network of a transformer block, four times as wide inside as its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, T, C] to the same shape."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, and feed-forward, each after a normalization and added to the input.

    Args:
        channels: width C of the input and output.
        heads: number of heads.
        context_dim: width D of the context. None means that the second attention is self-attention too.
    """

    def __init__(self, channels: int, heads: int, context_dim: int | None) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, heads, context_dim)
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.norm3 = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map `x` [N, T, C] and `context` [N, L, D] to [N, T, C]."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels, between two 1x1 convolutions, as one residual block.

    Args:
        channels: channels of the input and output.
        heads: number of heads.
        depth: number of transformer blocks.
        context_dim: width D of the context.
        groups: groups of the normalization.
    """

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int | None, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, heads, context_dim) for _ in range(depth)]
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map `x` [N, C, H, W] and `context` [N, L, D] to [N, C, H, W]."""
        h = rearrange(self.proj_in(self.norm(x)), "n c h w -> n (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "n (h w) c -> n c h w", w=x.shape[3]))
