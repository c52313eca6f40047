"""Where images come from: folders, `.zip`, `.npz` and `.npy` files, lmdb databases, CIFAR-10. Read by index, a batch at a time."""

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
    """Images by index. name: for messages. entries: their names, where they have some. hash: of all contents in their order."""

    name: str

    @property
    def entries(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    @property
    def hash(self) -> str: ...

    def picture(self, index: int) -> Image.Image:
        """Image `index` in RGB; ConfigError naming it if it cannot be read."""
        ...


def open_images(source: str | Path) -> Images:
    """The images of a folder (or of the folders below it), a `.zip` file, an array, an lmdb folder (LSUN), or `cifar10-train`.

    Arrays are uint8 [N, H, W, 3]: a `.npy` file, or `arr_0` of an `.npz` file.

    Raises:
        ConfigError: nothing of these, or no image in it.
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
    """The images of a folder, or of the folders below it (one for each class, say), in the order of their names; see `_arranged`."""

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
    """All files below a folder, relative to it; links to folders are followed, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(folders)
        if real not in seen:
            yield from (Path(folder, file).relative_to(path).as_posix() for file in files)
        seen.add(real)


def _arranged(names: Iterable[str], none: str, source: str) -> list[str]:
    """The images among relative names, in the order of their names, numbers in them by value (2 before 10).

    Names that begin with a dot are no images (`._0.png` of macOS), nor is what lies in such a folder or in `__MACOSX`.

    Raises:
        ConfigError: there are none (`none`), or some lie in `source` and others in folders below it.
    """
    images = [
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
    ]
    if not images:
        raise ConfigError(none)
    flat = [name for name in images if "/" not in name]
    if 0 < len(flat) < len(images):
        below = next(name for name in images if "/" in name)
        raise ConfigError(
            f"{source}: images in this folder ({flat[0]}) and in folders below it ({below}); expected one of the two"
        )
    return sorted(images, key=_natural)


def _natural(name: str) -> list[list[tuple[int, str]]]:
    """A sorting key with the numbers of a name by their values, folder by folder."""
    return [
        [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", folder)]
        for folder in name.split("/")
    ]


class _Zip:
    """The images inside a `.zip` file, in the order of a folder's."""

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
    """Images in one array, uint8 [N, H, W, 3]: mapped where it is stored, read whole where it is compressed."""

    entries: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        where = "arr_0" if path.suffix == ".npz" else "the array"
        try:
            self.array = (
                _map_member(path, "arr_0.npy")
                if path.suffix == ".npz"
                else np.load(path, mmap_mode="r", allow_pickle=False)
            )
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError) as error:
            key = " under the key arr_0" if path.suffix == ".npz" else ""
            raise ConfigError(f"{path}: expected uint8 images [N, H, W, 3]{key} ({error})") from None
        if (
            not isinstance(self.array, np.ndarray)
            or self.array.dtype != np.uint8
            or self.array.ndim != 4
            or self.array.shape[3] != 3
        ):
            shape = list(getattr(self.array, "shape", []))
            raise ConfigError(
                f"{path}: {where} is {getattr(self.array, 'dtype', 'an archive')} {shape}, expected uint8 [N, H, W, 3]"
            )
        if not len(self.array):
            raise ConfigError(f"{path}: {where} holds no images")

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
        if key not in self.hashes:  # a hundred gigabytes and more: read once a process
            with self.database.begin() as transaction:
                self.hashes[key] = _hash_all(hashlib.sha256(value).hexdigest() for _, value in transaction.cursor())
        return self.hashes[key]

    def picture(self, index: int) -> Image.Image:
        with self.database.begin() as transaction:
            content = bytes(transaction.get(self.keys[index]))
        return decode_rgb(io.BytesIO(content), f"{self.name}, image {index}")


class _Cifar10:
    """The 50,000 training images of CIFAR-10, fetched by torchvision (which checks their md5) into the cache."""

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
    """The first `count` of other images; with `crop`, cut to a centered square and resized to that size.

    The crop is the one of the latent-diffusion LSUN loader: bicubic, on 8-bit pixels. Without it FIDs of LSUN churches are off by 12.

    Raises:
        ConfigError: fewer images than `count`.
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
        return _hash_all([self.images.hash, str(len(self)), str(self.crop)])

    def names(self) -> list[str]:
        """The names of the images without their endings; none where they have no names."""
        return [str(PurePosixPath(entry).with_suffix("")) for entry in self.images.entries[: len(self)]]

    def picture(self, index: int) -> Image.Image:
        picture = self.images.picture(index)
        return picture if self.crop is None else center_crop(picture, self.crop)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images, `size` at a time, as `read` gives them."""
        for start in range(0, len(self), size):
            yield self.read(range(start, min(start + size, len(self))))

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [N, 3, H, W]; ConfigError where their sizes differ."""
        pictures = [self.picture(i) for i in indices]
        self._size = self._size or self.picture(0).size
        for index, picture in zip(indices, pictures, strict=True):
            if picture.size != self._size:
                found, first = ("x".join(map(str, size)) for size in (picture.size, self._size))
                raise ConfigError(
                    f"{self.name}: image {index} is {found}, the first one {first}; expected one size (--crop cuts a reference)"
                )
        return (
            torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()
        )


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """The largest centered square, resized to `size` by bicubic interpolation (latent diffusion's LSUN loader)."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    side = min(height, width)
    square = pixels[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    return Image.fromarray(square).resize((size, size), resample=Image.Resampling.BICUBIC)


def _hash_all(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\n")
    return total.hexdigest()


def _map_member(path: Path, member: str) -> np.ndarray:
    """An array of an `.npz` file without reading it, where it is not compressed."""
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
    with path.open("rb") as file:  # the local header may be longer than the one in the directory
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(name_length) + int(extra_length) + header
    return np.memmap(path, dtype, "r", offset, shape)
