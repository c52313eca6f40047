"""The emoji of the bundled models: an npm archive of PNG files becomes images and captions."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qdiff.utils.pictures import to_8_bit

ARCHIVE = "emoji-datasource-google-16.0.0.tgz"  # `npm pack emoji-datasource-google@16.0.0`
RENAMED = {"heavy black heart": "red heart"}
KINDS = {  # subcategory: the caption that every emoji of it also has
    "heart": "heart",
    "face-smiling": "smiling face",
    "face-affection": "smiling face",
    "face-concerned": "sad face",
    "face-negative": "angry face",
    "cat-face": "cat face",
    "monkey-face": "monkey",
    "country-flag": "flag",
    "flag": "flag",
    "animal-mammal": "animal face",
}


@dataclass(frozen=True)
class Emoji:
    """Images, uint8 [N, 3, size, size], on white, and for each its captions (lower case, the fullest first)."""

    images: Tensor
    captions: list[list[str]]


def is_face_or_heart(emoji: dict) -> bool:
    """The subset that a small model can learn in hours: faces, animal faces and hearts, all centered."""
    if emoji["category"] == "Smileys & Emotion":
        return emoji["subcategory"] != "emotion"
    return emoji["category"] == "Animals & Nature" and (emoji["name"] or "").endswith("FACE")


def is_some_flag(emoji: dict) -> bool:
    """Every sixth flag: enough for a model to know what a flag looks like."""
    return emoji["category"] == "Flags" and emoji["sort_order"] % 6 == 0


def load_emoji(archive: str | Path, size: int, flags: bool = False) -> Emoji:
    """Faces and hearts (with `flags`, some flags too), in the order of the archive's table.

    Raises:
        FileNotFoundError: the archive is not there; the message says how to get it.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise FileNotFoundError(f"{archive}: no such file; `npm pack {ARCHIVE[:-11]}@16.0.0` makes it ({ARCHIVE})")
    with tarfile.open(archive) as tar:
        table = json.load(tar.extractfile("package/emoji.json"))
        chosen = [e for e in table if is_face_or_heart(e) or (flags and is_some_flag(e))]
        files = [tar.extractfile(f"package/img/google/64/{e['image']}") for e in chosen]
        images = torch.stack([_on_white(to_8_bit(Image.open(file), str(archive)), size) for file in files])
    return Emoji(images, [_captions(e) for e in chosen])


def _captions(emoji: dict) -> list[str]:
    name = emoji["name"].lower().replace("-", " ")
    captions = [RENAMED.get(name, name), *(s.replace("_", " ").replace("-", " ") for s in emoji["short_names"])]
    return list(dict.fromkeys([*captions, KINDS.get(emoji["subcategory"], "face")]))


def _on_white(image: Image.Image, size: int) -> Tensor:
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    pixels = canvas.convert("RGB")
    if image.size != (size, size):
        pixels = pixels.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
