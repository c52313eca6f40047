"""Conversion of tensors to images, PNG files, grids and `.npz` files."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from qdiff.errors import ConfigError
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.files import atomic_write
from qdiff.utils.pictures import decode_rgb


def to_uint8(x: Tensor) -> Tensor:
    """Convert images [N, C, H, W] from [-1, 1] to uint8, rounded to nearest, as the pixel family does."""
    return ((x + 1) / 2).clamp(0, 1).mul(255).add(0.5).clamp(0, 255).to(torch.uint8).cpu()


def to_uint8_truncated(x: Tensor) -> Tensor:
    """Convert images [N, C, H, W] from [-1, 1] to uint8, truncated, as the latent family does."""
    return ((x.float() + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).cpu()


def save_png(path: str | Path, image: Tensor, metadata: dict[str, str] | None = None) -> None:
    """Write a uint8 image [C, H, W] atomically, with `metadata` as its text chunks."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        picture.save(file, format="PNG", pnginfo=info)


def load_png(path: str | Path) -> Tensor:
    """Read a PNG file as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(decode_rgb(path, str(path)))).permute(2, 0, 1)


def load_metadata(path: Path) -> dict[str, str]:
    """Read the text chunks of a PNG file. ConfigError if the file is broken."""
    try:
        with Image.open(path) as picture:
            return {str(key): value for key, value in picture.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: a broken image ({error})") from None


def save_npz(path: Path, files: Sequence[Path]) -> None:
    """Write images to a `.npz` file, as uint8 [N, H, W, C] with the key `arr_0`. One image is in memory at a time."""
    shape = (len(files), *load_png(files[0]).permute(1, 2, 0).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for image in files:
            file.write(load_png(image).permute(1, 2, 0).contiguous().numpy().tobytes())


def make_grid(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """Arrange uint8 images [N, C, H, W], each enlarged `scale` times, in a grid [3, H', W'] on white."""
    make_torchvision_importable()
    from torchvision.utils import make_grid as tile  # the import takes a second, and most runs need no grid

    return tile(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), nrow=columns, padding=2, pad_value=255)
