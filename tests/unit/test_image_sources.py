"""Images of folders, archives, arrays and other evaluators, and pixels of every kind."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.errors import ConfigError, NonFiniteError
from qdiff.evaluation import metrics
from qdiff.evaluation.features import Extractor, extract
from qdiff.evaluation.images import Selected, open_images
from qdiff.utils.pictures import decode_rgb
from qdiff_cli.images import load_png
from tests.support import pictures

GRAY = np.array([[0, 128, 129, 257], [32768, 32896, 65278, 65535]], dtype=np.uint16)
SCALED = [[0, 0, 1, 1], [128, 128, 254, 255]]


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    picture.save(content, kind)
    return content.getvalue()


def lmdb_of(folder, contents):
    import lmdb

    with lmdb.open(str(folder)) as database, database.begin(write=True) as transaction:
        for i, content in enumerate(contents):
            transaction.put(f"{i:04d}".encode(), content)
    return folder


def test_16_bit_gray_is_scaled_wherever_pictures_are_read(tmp_path):
    content = encoded(Image.fromarray(GRAY))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/0.png").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", content)
    for source in (tmp_path / "folder", tmp_path / "a.zip", lmdb_of(tmp_path / "lmdb", [content])):
        assert np.asarray(open_images(source).picture(0))[:, :, 1].tolist() == SCALED
    assert load_png(tmp_path / "folder/0.png")[2].tolist() == SCALED


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(tmp_path, mode):
    content = encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)).convert(mode), "TIFF")
    (tmp_path / "0.png").write_bytes(content)
    for read in (lambda: open_images(tmp_path).picture(0), lambda: load_png(tmp_path / "0.png")):
        with pytest.raises(ConfigError, match=rf"0\.png: pixels of the kind '{mode}'"):
            read()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bit_pixels_of_every_mode_become_rgb(mode):
    picture = Image.fromarray(np.full((2, 2, 3), 255, np.uint8)).convert(mode)
    decoded = decode_rgb(io.BytesIO(encoded(picture, "TIFF" if mode == "CMYK" else "PNG")), "it")
    assert decoded.mode == "RGB" and np.asarray(decoded).min() == 255


def save_tree(folder, images):
    """Images over class folders b/x, b/y and a, in the order of their names."""
    for path, image in zip(("a/2.png", "a/10.png", "b/x/0.png", "b/y/0.png"), images, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / path)
    for hidden in ("a/._2.png", ".trash/1.png", "__MACOSX/a/2.png", "a/notes.txt"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_bytes(b"no picture")


def test_class_folders_zips_and_arrays_hold_the_same_images(tmp_path):
    images = pictures.make(4, 0)
    save_tree(tmp_path / "tree", images)
    (tmp_path / "tree/b/again").symlink_to(tmp_path / "tree")  # a circle
    with zipfile.ZipFile(tmp_path / "tree.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tmp_path.glob("tree/**/*"), reverse=True):
            if file.is_file():
                archive.write(file, file.relative_to(tmp_path))
    np.save(tmp_path / "a.npy", images.permute(0, 2, 3, 1).numpy())
    for name in ("tree", "tree.zip", "a.npy"):
        found = Selected(open_images(tmp_path / name))
        assert torch.equal(found.read(range(len(found))), images), name
    assert Selected(open_images(tmp_path / "tree"), 3).names() == ["a/2", "a/10", "b/x/0"]
    assert Selected(open_images(tmp_path / "tree.zip"), 1).names() == ["tree/a/2"]


def test_images_of_a_folder_and_below_it_are_ambiguous(tmp_path):
    save_tree(tmp_path, pictures.make(4, 0))
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    with pytest.raises(
        ConfigError, match=r"images in this folder \(grid\.png\) and in folders below it \(.*/.*\.png\)"
    ):
        open_images(tmp_path)


def test_bad_archives_and_arrays_are_one_line(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match=r"cannot be read as \.zip"):
        open_images(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(ConfigError, match="no images"):
        open_images(tmp_path / "empty.zip")
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)))
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:
        archive.writestr("0.png", content)
    whole = (tmp_path / "damaged.zip").read_bytes()
    (tmp_path / "damaged.zip").write_bytes(whole.replace(content[40:60], bytes(20)))
    with pytest.raises(ConfigError, match=r"damaged\.zip, 0\.png: cannot be read"):
        open_images(tmp_path / "damaged.zip").picture(0)
    for array in (
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.array([{}]),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ConfigError, match=r"a\.npy"):
            open_images(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10_clean_train_32.npz", "mode clean"),
        ("my_own_legacy_tensorflow_custom_na.npz", "TensorFlow 1"),
        ("ffhq_legacy_pytorch_trainval_256.npz", "mode legacy_pytorch"),
        ("clean.npz", "as pytorch-fid saves them"),
        ("fid_stats_cifar10_train.npz", "as pytorch-fid saves them"),
    ],
)
def test_statistics_of_other_evaluators_say_what_made_them(tmp_path, name, words):
    np.savez(tmp_path / name, mu=np.zeros(2048, np.float32), sigma=np.eye(2048))
    found = metrics.load_statistics(tmp_path / name)
    assert words in found.kind and found.mu.dtype == np.float64
    metrics.expect_extractor(found, "inception 6726825d0af5f729")
    with pytest.raises(ConfigError, match="expected the Inception extractor"):
        metrics.expect_extractor(found, "lite0 57934424")


def test_statistics_and_features_that_are_not_finite_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    with pytest.raises(NonFiniteError, match=r"s\.npz: statistics that are not finite"):
        metrics.load_statistics(tmp_path / "s.npz")
    np.save(tmp_path / "a.npy", pictures.make(4, 0).permute(0, 2, 3, 1).numpy())
    broken = Extractor(
        "broken", "0" * 64, "", lambda images: (torch.full((len(images), 2), torch.nan), torch.zeros(len(images), 2))
    )
    with pytest.raises(ConfigError, match="broken: features that are not finite numbers, in images 0 to 3"):
        extract(Selected(open_images(tmp_path / "a.npy")), broken, tmp_path / "cache")
