"""The CLIP score, which says how well images fit their prompts, by a CLIP model in a local folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from qdiff.checkpoint import read_tensors
from qdiff.checkpoint.reading import validate_finite
from qdiff.errors import ConfigError
from qdiff.utils.compat import make_torchvision_importable

MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # pixel statistics of CLIP's training images


class ClipScore:
    """The mean cosine between the embeddings of images and of their prompts, accumulated over batches.

    It is the score of Hessel et al. 2021 (arXiv 2104.08718) without its factor 2.5.

    Args:
        folder: a CLIP model as the library `transformers` saves it: config.json, model.safetensors, vocab.json and
            merges.txt.
        device: where the model runs.

    Raises:
        ConfigError: a file is missing.
        CheckpointError: the weights are damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        missing = [
            name
            for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt")
            if not (folder / name).is_file()
        ]
        if missing:
            raise ConfigError(f" {folder}: missing {', '.join(missing)} of a CLIP model", field="clip")
        make_torchvision_importable()
        from transformers import CLIPModel, CLIPTokenizer

        validate_finite(folder / "model.safetensors", read_tensors(folder / "model.safetensors"))
        self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.device, self.total, self.count = device, 0.0, 0

    @torch.no_grad()
    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add a batch.

        Args:
            images: uint8 [N, 3, H, W].
            prompts: N texts.
        """
        config = self.model.config
        size = config.vision_config.image_size
        x = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        length = config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        output = self.model(pixel_values=((x - mean) / std).to(self.device), **tokens.to(self.device))
        self.total += F.cosine_similarity(output.image_embeds, output.text_embeds).sum().item()
        self.count += len(images)

    @property
    def mean(self) -> float:
        """The score over all images so far."""
        return self.total / self.count
