"""Small images with structure: squares and stripes of random colors."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def make(count: int, seed: int, size: int = 32) -> Tensor:
    """uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((count, 3, size, size), 255, dtype=torch.uint8)
    for image in images:
        for _ in range(4):
            color = torch.randint(0, 256, (3, 1, 1), generator=generator).to(torch.uint8)
            y, x, h, w = (int(v) for v in torch.randint(0, size // 2, (4,), generator=generator))
            image[:, y : y + h + 2, x : x + w + 2] = color
    return images


def save(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    return folder
