"""Conversion of encoded pictures to 8-bit RGB, the one rule for all places that read pictures."""

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from qdiff.errors import ConfigError

EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


def to_8_bit(picture: Image.Image, name: str) -> Image.Image:
    """Convert a picture to 8-bit channels.

    Args:
        picture: a picture of 8-bit channels, which is returned unchanged, or of 16-bit gray, which is scaled from
            0..65535 to 0..255 and rounded to nearest.
        name: what messages call the picture.

    Raises:
        ConfigError: the range of the pixels is unknown, because they are floating-point or exceed 16 bits.
    """
    if picture.mode in EIGHT_BIT_MODES:
        return picture
    # Pillow opens 16-bit files as "I;16" in several byte orders; older versions open a 16-bit PNG as "I"
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() >= 0 and values.max() <= 65535 and (picture.mode != "I" or picture.format == "PNG"):
            return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    raise ConfigError(
        f"{name}: pixels of the kind {picture.mode!r}, whose range is not known; expected 8 or 16 bits a channel"
    )


def decode_rgb(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """Decode a picture to 8-bit RGB. Transparency is dropped, not blended.

    Args:
        file: the encoded picture.
        name: what messages call it.

    Raises:
        ConfigError: the file cannot be decoded, or the range of its pixels is unknown.
    """
    try:
        with Image.open(file) as picture:
            return to_8_bit(picture, name).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: a broken image ({error})") from None
