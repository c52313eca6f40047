"""Encoded pictures to 8-bit RGB: one rule wherever pictures are read."""

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from qdiff.errors import ConfigError

EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


def to_8_bit(picture: Image.Image, name: str) -> Image.Image:
    """A picture of 8-bit channels: as it is, or 16-bit gray scaled from 0..65535 to 0..255, rounded to nearest.

    Raises:
        ConfigError: `name` has pixels whose range is not known: floating point, or whole numbers outside 16 bits.
    """
    if picture.mode in EIGHT_BIT:
        return picture
    if picture.mode.startswith(
        "I"
    ):  # "I;16" in its byte orders; "I" where a PNG of 16 bits was opened by an older Pillow
        values = np.asarray(picture).astype(np.int64)
        if values.min() >= 0 and values.max() <= 65535 and (picture.mode != "I" or picture.format == "PNG"):
            return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    raise ConfigError(
        f"{name}: pixels of the kind {picture.mode!r}, whose range is not known; expected 8 or 16 bits a channel"
    )


def decode_rgb(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """An encoded picture as 8-bit RGB; transparency is dropped, not blended.

    Raises:
        ConfigError: `name` cannot be decoded, or its pixels have no known range.
    """
    try:
        with Image.open(file) as picture:
            return to_8_bit(picture, name).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: a broken image ({error})") from None
