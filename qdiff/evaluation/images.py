"""Sources of images: folders, `.zip`, `.npz` and `.npy` files, lmdb databases, CIFAR-10. Images are read by index."""

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar, Protocol

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from qdiff.errors import ConfigError
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.download import cache_root
from qdiff.utils.extras import require_extra
from qdiff.utils.files import file_hash
from qdiff.utils.pictures import decode_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CIFAR10 = "cifar10-train"


class Images(Protocol):
    """A source of images.

    Attributes:
        name: what messages call the source.
    """

    name: str

    @property
    def entries(self) -> Sequence[str]:
        """The names of the images; empty if they have none."""
        ...

    def __len__(self) -> int: ...

    @property
    def hash(self) -> str:
        """A hash of the contents of all images in their order."""
        ...

    def picture(self, index: int) -> Image.Image:
        """Read image `index` in RGB.

        Raises:
            ConfigError: it cannot be read. The message names it.
        """
        ...


def open_images(source: str | Path) -> Images:
    """Open a source of images.

    Args:
        source: a folder with images in it or in the folders below it; a `.zip` file of images; an array uint8
            [N, H, W, 3], which is a `.npy` file or `arr_0` of an `.npz` file; an lmdb folder (LSUN); `cifar10-train`.

    Raises:
        ConfigError: the source is none of these, or holds no image.
    """
    if str(source) == CIFAR10:
        return _Cifar10()
    path = Path(source)
    if (path / "data.mdb").is_file():
        return _Lmdb(path)
    if path.is_dir():
        return _Folder(path)
    if path.suffix == ".zip" and path.is_file():
        return _Zip(path)
    if path.suffix in (".npz", ".npy") and path.is_file():
        return _Array(path)
    raise ConfigError(f"{source}: expected a folder of images, a .zip, .npz or .npy file, an lmdb folder or {CIFAR10}")


class _Folder:
    """The images of a folder or of the folders below it, such as one for each class, in the order of `_arranged`."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.entries = _arranged(_below(path), f"{path}: no images ({', '.join(SUFFIXES)}) in this folder", self.name)
        self.files = [path / entry for entry in self.entries]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def hash(self) -> str:
        return _hash_all(file_hash(file) for file in self.files)

    def picture(self, index: int) -> Image.Image:
        return decode_rgb(self.files[index], str(self.files[index]))


def _below(path: Path) -> Iterator[str]:
    """All files below a folder, relative to it. Links to folders are followed, but no folder is visited twice."""
    seen = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(folders)
        if real not in seen:
            yield from (Path(folder, file).relative_to(path).as_posix() for file in files)
        seen.add(real)


def _arranged(names: Iterable[str], none_message: str, source: str) -> list[str]:
    """Select and sort images by their names; numbers in names are compared by value (2 before 10).

    Files and folders whose names begin with a dot (`._0.png` of macOS) and the folder `__MACOSX` are skipped.

    Args:
        names: relative paths of files.
        none_message: the message of the error if there are no images.
        source: what messages call the source.

    Raises:
        ConfigError: there are no images, or some are in `source` itself and others in folders below it.
    """
    images = [
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
    ]
    if not images:
        raise ConfigError(none_message)
    flat = [name for name in images if "/" not in name]
    if 0 < len(flat) < len(images):
        below = next(name for name in images if "/" in name)
        raise ConfigError(
            f"{source}: images in this folder ({flat[0]}) and in folders below it ({below}); expected one of the two"
        )
    return sorted(images, key=_natural)


def _natural(name: str) -> list[list[tuple[int, str]]]:
    """A sorting key that compares the numbers in a name by their values, folder by folder."""
    return [
        [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", folder)]
        for folder in name.split("/")
    ]


class _Zip:
    """The images inside a `.zip` file, in the order of `_arranged`."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as .zip ({error})") from None
        self.entries = _arranged(
            self.archive.namelist(), f"{path}: no images ({', '.join(SUFFIXES)}) in this file", self.name
        )

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def hash(self) -> str:
        return file_hash(self.path)

    def picture(self, index: int) -> Image.Image:
        name = f"{self.name}, {self.entries[index]}"
        try:
            content = self.archive.read(self.entries[index])
        except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, NotImplementedError) as error:
            raise ConfigError(f"{name}: cannot be read ({error})") from None
        return decode_rgb(io.BytesIO(content), name)


class _Array:
    """Images in one array, uint8 [N, H, W, 3], which is mapped into memory, or read as a whole if it is compressed."""

    entries: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        archive = path.suffix == ".npz"
        where = "arr_0" if archive else "the array"
        try:
            array = _map_member(path, "arr_0.npy") if archive else np.load(path, mmap_mode="r", allow_pickle=False)
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError) as error:
            key = " under the key arr_0" if archive else ""
            raise ConfigError(f"{path}: expected uint8 images [N, H, W, 3]{key} ({error})") from None
        right_type = isinstance(array, np.ndarray) and array.dtype == np.uint8
        if not (right_type and array.ndim == 4 and array.shape[3] == 3):
            shape = list(getattr(array, "shape", []))
            raise ConfigError(
                f"{path}: {where} is {getattr(array, 'dtype', 'an archive')} {shape}, expected uint8 [N, H, W, 3]"
            )
        if not len(array):
            raise ConfigError(f"{path}: {where} holds no images")
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @cached_property
    def hash(self) -> str:
        return file_hash(self.path)

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(np.asarray(self.array[index]))


class _Lmdb:
    """An lmdb database of encoded images, as LSUN is published."""

    hashes: ClassVar[dict[tuple, str]] = {}
    entries: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        require_extra("eval", "lmdb")
        import lmdb

        self.name, self.file = str(path), path / "data.mdb"
        try:
            self.database = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
            with self.database.begin() as transaction:
                self.keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
        except lmdb.Error as error:
            raise ConfigError(f"{path}: not an lmdb database, or a damaged one ({error})") from None
        if not self.keys:
            raise ConfigError(f"{path}: no images in this database")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def hash(self) -> str:
        status = self.file.stat()
        key = (self.name, status.st_size, status.st_mtime_ns)
        if key not in self.hashes:  # the database can exceed a hundred gigabytes, so it is read once in a process
            with self.database.begin() as transaction:
                self.hashes[key] = _hash_all(hashlib.sha256(value).hexdigest() for _, value in transaction.cursor())
        return self.hashes[key]

    def picture(self, index: int) -> Image.Image:
        with self.database.begin() as transaction:
            content = bytes(transaction.get(self.keys[index]))
        return decode_rgb(io.BytesIO(content), f"{self.name}, image {index}")


class _Cifar10:
    """The 50,000 training images of CIFAR-10, which torchvision downloads into the cache and checks by md5."""

    name = CIFAR10
    entries: Sequence[str] = ()

    def __init__(self) -> None:
        make_torchvision_importable()
        from torchvision.datasets import CIFAR10 as Dataset

        root = cache_root() / "qdiff" / "datasets"
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / "cifar10.lock"):
                self.array = Dataset(str(root), train=True, download=True).data
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{CIFAR10}: not in {root} and cannot be fetched ({error}); put cifar-10-batches-py there"
            ) from None

    def __len__(self) -> int:
        return len(self.array)

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.array.tobytes()).hexdigest()

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])


class Selected:
    """The first images of a source, cropped if desired.

    The crop is that of latent diffusion's LSUN loader: bicubic, on 8-bit pixels. Without it, FIDs of LSUN churches are
    off by 12.

    Args:
        images: the source.
        count: the number of images; None: all.
        crop: the size to which the largest centered square is resized, in pixels; None: images stay as they are.

    Raises:
        ConfigError: the source has fewer images than `count`.
    """

    def __init__(self, images: Images, count: int | None = None, crop: int | None = None) -> None:
        if count is not None and len(images) < count:
            raise ConfigError(f"{images.name}: {len(images)} images, expected at least {count}")
        self.images, self.count, self.crop = images, count, crop
        self.name = images.name
        self._size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.count or len(self.images)

    @property
    def hash(self) -> str:
        """A hash of the contents of all images in their order."""
        return _hash_all([self.images.hash, str(len(self)), str(self.crop)])

    def names(self) -> list[str]:
        """The names of the images without their endings; empty if they have no names."""
        return [str(PurePosixPath(entry).with_suffix("")) for entry in self.images.entries[: len(self)]]

    def picture(self, index: int) -> Image.Image:
        """Read image `index` in RGB."""
        picture = self.images.picture(index)
        return picture if self.crop is None else center_crop(picture, self.crop)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield all images in batches of `size`, uint8 [N, 3, H, W]."""
        for start in range(0, len(self), size):
            yield self.read(range(start, min(start + size, len(self))))

    def read(self, indices: Sequence[int]) -> Tensor:
        """Read images.

        Args:
            indices: their numbers.

        Returns:
            uint8 [N, 3, H, W].

        Raises:
            ConfigError: an image cannot be read, or its size differs from that of the first image.
        """
        pictures = [self.picture(i) for i in indices]
        self._size = self._size or self.picture(0).size
        for index, picture in zip(indices, pictures, strict=True):
            if picture.size != self._size:
                found, first = ("x".join(map(str, size)) for size in (picture.size, self._size))
                raise ConfigError(
                    f"{self.name}: image {index} is {found}, the first one {first}; expected one size, as by `crop`"
                )
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        return pixels.permute(0, 3, 1, 2).contiguous()


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize the largest centered square to [size, size], bicubic, as latent diffusion's LSUN loader does."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    side = min(height, width)
    square = pixels[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    return Image.fromarray(square).resize((size, size), resample=Image.Resampling.BICUBIC)


def _hash_all(parts: Iterable[str]) -> str:
    """A hash of texts in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\n")
    return total.hexdigest()


def _map_member(path: Path, member: str) -> np.ndarray:
    """Map an array of an `.npz` file into memory; read it if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[member.removesuffix(".npy")]
        with archive.open(info) as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
            header = file.tell()
    if dtype.hasobject or fortran:
        raise ValueError(f"an array of {dtype}")
    with path.open("rb") as file:  # the header beside the data may be longer than the copy in the archive's directory
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(name_length) + int(extra_length) + header
    return np.memmap(path, dtype, "r", offset, shape)
