"""Images: tensors to PNG files and grids."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qdiff.files import atomic_write


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], [N, C, H, W], to uint8, rounded to nearest (the pixel family's rule)."""
    return ((x + 1) / 2).clamp(0, 1).mul(255).add(0.5).clamp(0, 255).to(torch.uint8).cpu()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write one uint8 image [C, H, W], atomically."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        picture.save(file, format="PNG")


def make_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """Tile uint8 images [N, C, H, W] into one [C, H', W'] on white, each enlarged `scale` times."""
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.full((c, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[:, y : y + height, x : x + width] = image
    return canvas
