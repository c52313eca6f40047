"""Conditioning: CLIP's text tower and tokenizer (built offline), and the class embedder."""

import gzip
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.errors import ConfigError
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.resources import find

CLIP_MERGES = 48894


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(part, "n t (heads d) -> n heads t d", heads=self.heads) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(h, "n heads t d -> n t (heads d)"))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.activation = QuickGELU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class TextTransformer(nn.Module):
    """CLIP's text tower (Radford et al. 2021, arXiv 2103.00020): tokens [N, L] to the states after the final norm [N, L, width]."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(vocabulary, width)
        self.embeddings.position_embedding = nn.Embedding(length, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([_Layer(width, heads) for _ in range(layers)])
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings.token_embedding(tokens) + self.embeddings.position_embedding.weight[: tokens.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class FrozenCLIPEmbedder(nn.Module):
    """Prompts to context [N, max_length, width]. The defaults are CLIP ViT-L/14, the text tower of Stable Diffusion v1.

    Args:
        vocabulary: a file of BPE merges, one a line, below the repository (default: CLIP's own table).
    """

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        max_length: int = 77,
        vocabulary: str | None = None,
        version: str = "openai/clip-vit-large-patch14",
    ) -> None:
        super().__init__()
        self.max_length, self.vocabulary = max_length, vocabulary
        merges = CLIP_MERGES if vocabulary is None else len(read_merges(vocabulary))
        self.transformer = nn.Module()
        self.transformer.text_model = TextTransformer(512 + merges + 2, width, layers, heads, max_length)
        self._tokenizer = None

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            self._tokenizer = make_tokenizer(clip_merges() if self.vocabulary is None else read_merges(self.vocabulary))
        return self._tokenizer

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers [N, max_length]: start, the prompt (cut if it is longer), and end up to the full length."""
        encoded = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.max_length)
        return torch.tensor(encoded["input_ids"])

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that `tokenize` cuts because it is too long; nothing where it fits."""
        tokens = self.tokenizer([prompt])["input_ids"][0]
        return self.tokenizer.decode(tokens[self.max_length - 1 : -1]) if len(tokens) > self.max_length else ""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        text = self.transformer.text_model
        return text(self.tokenize(prompts).to(text.final_layer_norm.weight.device))


class ClassEmbedder(nn.Module):
    """Class numbers to context [N, 1, embed_dim]; the last class means "no class" (for guidance)."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @torch.no_grad()
    def encode(self, classes: Sequence[int]) -> Tensor:
        index = torch.tensor(list(classes), device=self.embedding.weight.device)
        return self.embedding(index)[:, None]


class BERTEmbedder(nn.Module):
    """The text tower of LAION's 1p4B model: its place in the YAML is known, the tower is not supported."""

    def __init__(self, n_embed: int, n_layer: int) -> None:
        super().__init__()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        raise ConfigError(
            "BERTEmbedder (the text tower of the 1p4B model): not supported; its UNet and autoencoder are"
        )


def clip_merges() -> list[str]:
    """The merges of CLIP's BPE table, which the open_clip_torch package carries (found without importing it).

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None:
        raise ConfigError(
            "CLIP's vocabulary: expected the package open_clip_torch, which carries it (pip install open_clip_torch)"
        )
    with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        return file.read().split("\n")[1 : CLIP_MERGES + 1]


def read_merges(name: str) -> list[str]:
    """The merges of a bundled vocabulary: one a line, in a file below the repository."""
    path = find(name)
    if not path.is_file():
        raise ConfigError(f"vocabulary {path}: no such file")
    return path.read_text(encoding="utf-8").splitlines()


def make_tokenizer(merges: list[str]):
    """CLIP's tokenizer over the given merges, from nothing but them (Sennrich et al. 2016; Radford et al. 2021)."""
    make_torchvision_importable()
    from transformers import CLIPTokenizer

    symbols = list(_byte_symbols().values())
    words = symbols + [symbol + "</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[tuple(merge.split()) for merge in merges]
    )


def _byte_symbols() -> dict[int, str]:
    """A printable character for every byte, the printable bytes first (the order of CLIP's vocabulary)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def merges_for(captions: Sequence[str]) -> list[str]:
    """The merges of CLIP's table that tokenize these captions (and every text of the same words) as CLIP does."""
    words = {word for caption in captions for word in caption.lower().split()}
    ranks = {tuple(merge.split()): i for i, merge in enumerate(clip_merges())}
    used: set[int] = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            used.add(ranks[best])
            parts = _merge(parts, best)
    return [merge for i, merge in enumerate(clip_merges()) if i in used]


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged
