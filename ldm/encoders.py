"""Conditioners: text towers with their tokenizers, made offline, and the class embedder."""

import gzip
import importlib.util
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.errors import ConfigError
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.resources import find

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CLIP_MERGES = 48894  # the number of merges in CLIP's BPE table
BERT_NOT_SUPPORTED = "BERTEmbedder (the text tower of the 1p4B model): not supported; its UNet and autoencoder are"


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class _SelfAttention(nn.Module):
    """Causal self-attention over tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(part, "n t (heads d) -> n heads t d", heads=self.heads) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(h, "n heads t d -> n t (heads d)"))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class _Layer(nn.Module):
    """One transformer layer: attention and feed-forward network, each after a normalization and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = _MLP(width)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    """The sum of the embeddings of tokens and of positions."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class _Layers(nn.Module):
    """The transformer layers, under their released names."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    """CLIP's text tower (Radford et al. 2021, arXiv 2103.00020).

    Args:
        vocabulary: number of tokens.
        width: width of the states.
        layers: number of transformer layers.
        heads: attention heads of each layer.
        length: largest number of tokens of a text.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embeddings = _Embeddings(vocabulary, width, length)
        self.encoder = _Layers(width, layers, heads)
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, L] to the states after the final normalization, [N, L, width]."""
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


class Conditioner(nn.Module):
    """A map from prompts or classes to contexts."""

    def encode(self, inputs: Sequence[Any]) -> Tensor:
        """Return the contexts of N prompts or classes, [N, L, D]."""
        raise NotImplementedError


class _ReleasedTextModel(nn.Module):
    """The level `transformer` in the released names of the text tower's parameters."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model


class TextEmbedder(Conditioner):
    """From prompts to contexts [N, max_length, D], by a tokenizer and a text tower.

    Args:
        tower: the text tower, called with tokens [N, max_length].
        max_length: number of tokens of a context; longer prompts are cut.
    """

    def __init__(self, tower: nn.Module, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.transformer = _ReleasedTextModel(tower)

    @cached_property
    def tokenizer(self) -> "CLIPTokenizer":
        """The tokenizer, made on first use."""
        return self._make_tokenizer()

    def _make_tokenizer(self) -> "CLIPTokenizer":
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token numbers [N, max_length]: the start token, the prompt, the end token, and pad tokens."""
        encoded = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.max_length)
        return torch.tensor(encoded["input_ids"])

    def cut_off(self, prompt: str) -> str:
        """Return the end of a prompt that `tokenize` cuts off, or an empty string if the prompt is short enough."""
        tokens = self.tokenizer([prompt], verbose=False)["input_ids"][0]
        return self.tokenizer.decode(tokens[self.max_length - 1 : -1]) if len(tokens) > self.max_length else ""

    @torch.no_grad()
    def encode(self, inputs: Sequence[str]) -> Tensor:
        """Return the contexts of N prompts, [N, max_length, D]."""
        tower: Any = self.transformer.text_model
        return self._states(tower, self.tokenize(inputs).to(tower.final_layer_norm.weight.device))

    def _states(self, tower: Any, tokens: Tensor) -> Tensor:
        """Run the tower. Returns its states after the final normalization, [N, max_length, D]."""
        return tower(tokens)


class FrozenCLIPEmbedder(TextEmbedder):
    """CLIP's text tower with its tokenizer. The defaults are CLIP ViT-L/14, as in Stable Diffusion v1.

    Args:
        width: width of the states.
        layers: number of transformer layers.
        heads: attention heads of each layer.
        max_length: number of tokens of a context; longer prompts are cut.
        vocabulary: a file with BPE merges, one a line, below the repository. The default is CLIP's own table.
        version: ignored; accepted for the published files.
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
        merges = CLIP_MERGES if vocabulary is None else len(read_merges(vocabulary))
        super().__init__(TextTransformer(512 + merges + 2, width, layers, heads, max_length), max_length)
        self.vocabulary = vocabulary

    def _make_tokenizer(self) -> "CLIPTokenizer":
        return make_tokenizer(clip_merges() if self.vocabulary is None else read_merges(self.vocabulary))


class TransformersEmbedder(TextEmbedder):
    """The CLIPTextModel of the library transformers with the tokenizer of a folder of diffusers.

    Stable Diffusion 2 needs it: its tower has another activation, and its tokenizer pads with another token.

    Args:
        settings: arguments of CLIPTextConfig.
        max_length: number of tokens of a context; longer prompts are cut.
        tokenizer_folder: the folder of the tokenizer.
    """

    def __init__(self, settings: dict[str, Any], max_length: int, tokenizer_folder: str) -> None:
        make_torchvision_importable()
        from transformers import CLIPTextConfig, CLIPTextModel

        # the numbers of the special tokens only serve the pooled output, which is not used
        config = CLIPTextConfig(**settings, bos_token_id=0, eos_token_id=0, pad_token_id=0, attn_implementation="sdpa")
        model = CLIPTextModel(config)
        tower = getattr(model, "text_model", model)  # transformers 5 has no such level any more
        tower.embeddings.position_ids = None  # `_states` passes them: a buffer that no file holds stays on meta
        super().__init__(tower, max_length)
        self.tokenizer_folder, self.vocab_size = tokenizer_folder, config.vocab_size

    def _make_tokenizer(self) -> "CLIPTokenizer":
        make_torchvision_importable()
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)
        except Exception as error:  # the tokenizer library raises plain exceptions
            message = str(error).strip().splitlines()
            raise ConfigError(
                f"{self.tokenizer_folder}: a tokenizer that cannot be read ({message[0][:160] if message else error!r})"
            ) from None
        if len(tokenizer) > self.vocab_size:
            raise ConfigError(
                f"{self.tokenizer_folder}: {len(tokenizer)} tokens: expected at most {self.vocab_size}, the vocab_size "
                "of the text tower"
            )
        return tokenizer

    def _states(self, tower: Any, tokens: Tensor) -> Tensor:
        positions = torch.arange(self.max_length, device=tokens.device)[None]
        return tower(input_ids=tokens, position_ids=positions).last_hidden_state


class ClassEmbedder(Conditioner):
    """From class numbers to contexts [N, 1, embed_dim].

    Args:
        embed_dim: width of the contexts.
        n_classes: number of classes. The last class means "no class" and serves guidance.
        key: ignored; accepted for the published files.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @torch.no_grad()
    def encode(self, inputs: Sequence[int]) -> Tensor:
        """Return the contexts of N class numbers, [N, 1, embed_dim]."""
        index = torch.tensor(list(inputs), device=self.embedding.weight.device)
        return self.embedding(index)[:, None]


class BERTEmbedder(Conditioner):
    """The text tower of LAION's 1p4B model. Its settings in the YAML file are known, but the tower is not supported.

    Args:
        n_embed: ignored.
        n_layer: ignored.
    """

    def __init__(self, n_embed: int, n_layer: int) -> None:
        super().__init__()

    def encode(self, inputs: Sequence[str]) -> Tensor:
        """Raise a ConfigError."""
        raise ConfigError(BERT_NOT_SUPPORTED)


def clip_merges() -> list[str]:
    """Read the merges of CLIP's BPE table from the open_clip_torch package, without importing it.

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
    """Read the merges of a bundled vocabulary, one a line, from a file below the repository.

    Raises:
        ConfigError: the file does not exist.
    """
    path = find(name)
    if not path.is_file():
        raise ConfigError(f" {path}: no such file", field="vocabulary")
    return path.read_text(encoding="utf-8").splitlines()


def make_tokenizer(merges: list[str]) -> "CLIPTokenizer":
    """Make CLIP's tokenizer from the merges alone (Sennrich et al. 2016, arXiv 1508.07909; arXiv 2103.00020).

    Args:
        merges: pairs of symbols separated by a blank, the most frequent pair first.
    """
    make_torchvision_importable()
    from transformers import CLIPTokenizer

    symbols = list(_byte_symbols().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split()) for merge in merges]
    )


def _byte_symbols() -> dict[int, str]:
    """Return a printable character for every byte, in the order of CLIP's vocabulary: the printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def merges_for(captions: Sequence[str]) -> list[str]:
    """Select the merges that tokenize these captions, and every other text of their words, as CLIP does.

    Returns:
        The merges in the order of CLIP's table.
    """
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
    """Join every occurrence of the pair."""
    merged, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged
