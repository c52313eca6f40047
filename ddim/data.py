"""The training data of the bundled models: emoji from an npm archive of PNG files, as images and captions."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qdiff.utils.pictures import to_8_bit

ARCHIVE = "emoji-datasource-google-16.0.0.tgz"  # `npm pack emoji-datasource-google@16.0.0`
RENAMED = {"heavy black heart": "red heart"}
KINDS = {  # from a subcategory to the caption that all its emoji share
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
    """Emoji and their captions.

    Attributes:
        images: on a white background, uint8 [N, 3, size, size].
        captions: the captions of each image, in lower case, the most complete one first.
    """

    images: Tensor
    captions: list[list[str]]


def is_face_or_heart(emoji: dict[str, Any]) -> bool:
    """Select what a small model can learn in hours: faces, animal faces and hearts, which are all centered."""
    if emoji["category"] == "Smileys & Emotion":
        return emoji["subcategory"] != "emotion"
    return emoji["category"] == "Animals & Nature" and (emoji["name"] or "").endswith("FACE")


def is_some_flag(emoji: dict[str, Any]) -> bool:
    """Select every sixth flag: enough for a model to learn what a flag looks like."""
    return emoji["category"] == "Flags" and emoji["sort_order"] % 6 == 0


def load_emoji(archive: str | Path, size: int, flags: bool = False) -> Emoji:
    """Load faces and hearts in the order of the archive's table.

    Args:
        archive: the npm archive `ARCHIVE`.
        size: width and height of the images in pixels.
        flags: whether to load some flags as well.

    Raises:
        FileNotFoundError: the archive does not exist. The message says how to get it.
    """
    archive = Path(archive)
    if not archive.is_file():
        raise FileNotFoundError(f"{archive}: no such file; `npm pack {ARCHIVE[:-11]}@16.0.0` makes it ({ARCHIVE})")
    with tarfile.open(archive) as tar:
        table = json.load(_member(tar, "package/emoji.json"))
        chosen = [emoji for emoji in table if is_face_or_heart(emoji) or (flags and is_some_flag(emoji))]
        files = [_member(tar, f"package/img/google/64/{emoji['image']}") for emoji in chosen]
        images = torch.stack([_on_white(to_8_bit(Image.open(file), str(archive)), size) for file in files])
    return Emoji(images, [_captions(emoji) for emoji in chosen])


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """Open a regular file of an archive."""
    file = archive.extractfile(name)
    if file is None:
        raise FileNotFoundError(f"{name}: expected a regular file in the archive")
    return file


def _captions(emoji: dict[str, Any]) -> list[str]:
    """Return the name of an emoji, its short names and the caption of its kind, each once."""
    name = emoji["name"].lower().replace("-", " ")
    captions = [RENAMED.get(name, name), *(s.replace("_", " ").replace("-", " ") for s in emoji["short_names"])]
    return list(dict.fromkeys([*captions, KINDS.get(emoji["subcategory"], "face")]))


def _on_white(image: Image.Image, size: int) -> Tensor:
    """Put an image on a white background; return uint8 [3, size, size]."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    pixels = canvas.convert("RGB")
    if image.size != (size, size):
        pixels = pixels.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
