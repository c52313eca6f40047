"""The emoji of the embedded models: an npm archive of PNG files becomes one tensor of images."""

import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ARCHIVE = "emoji-datasource-google-16.0.0.tgz"  # `npm pack emoji-datasource-google@16.0.0`


def is_face_or_heart(emoji: dict) -> bool:
    """The subset that a small model can learn in hours: faces, animal faces and hearts, all centered."""
    if emoji["category"] == "Smileys & Emotion":
        return emoji["subcategory"] != "emotion"
    return emoji["category"] == "Animals & Nature" and (emoji["name"] or "").endswith("FACE")


def load_emoji(archive: str | Path, size: int) -> Tensor:
    """The chosen emoji on white, in the order of the archive's table: uint8 [N, 3, size, size].

    Raises:
        FileNotFoundError: the archive is not there; the message says how to get it.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise FileNotFoundError(f"{archive}: no such file; `npm pack {ARCHIVE[:-11]}@16.0.0` makes it ({ARCHIVE})")
    with tarfile.open(archive) as tar:
        table = json.load(tar.extractfile("package/emoji.json"))
        files = [tar.extractfile(f"package/img/google/64/{e['image']}") for e in table if is_face_or_heart(e)]
        return torch.stack([_on_white(Image.open(file), size) for file in files])


def _on_white(image: Image.Image, size: int) -> Tensor:
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    pixels = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
