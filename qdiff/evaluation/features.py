"""Features of images, extracted chunk by chunk by any number of processes and cached under a hash of their origin."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.checkpoint import read_tensors
from qdiff.checkpoint.reading import validate_finite
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.evaluation.images import Selected
from qdiff.evaluation.lite0 import load_lite0, to_input, weights_file
from qdiff.utils import distributed
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.download import cache_root, fetch
from qdiff.utils.extras import require_extra
from qdiff.utils.files import atomic_write, file_hash
from qdiff.utils.finite import first_not_finite

EXTRACTORS = ("inception", "lite0")
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


@dataclass(frozen=True)
class Extractor:
    """A network that extracts features from images.

    Attributes:
        name: one of `EXTRACTORS`.
        weights_sha256: the hash of the file with its weights.
        note: what metrics of its features may be compared with.
        run: from uint8 images [N, 3, H, W] to features [N, D] and logits [N, K], float32.
    """

    name: str
    weights_sha256: str
    note: str
    run: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def identity(self) -> str:
        """Name and weights, as caches and statistics store them."""
        return f"{self.name} {self.weights_sha256[:16]}"


def load_extractor(name: str, device: torch.device, weights: Path | None = None) -> Extractor:
    """Load an extractor.

    Args:
        name: `inception`, the network of the published FID in torch-fidelity's conversion, or `lite0`, which is
            EfficientNet-Lite0 and works offline.
        device: where the network runs.
        weights: the file with its weights; None: `inception` downloads them, `lite0` finds them in their package.

    Raises:
        ConfigError: there are no weights.
        CheckpointError: the file is damaged or holds something else.
    """
    if name == "lite0":
        path = weights or weights_file()
        network = load_lite0(path).to(device)

        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            _, pool, logits = network(to_input(images.to(device)))
            return pool, logits

        note = "EfficientNet-Lite0 features: NOT comparable with published (Inception) figures"
        return Extractor("lite0", file_hash(path), note, run)
    standard = weights is None
    path = weights or fetch(INCEPTION_URL, cache_root() / "qdiff" / INCEPTION, "6726825d", "sha256")
    inception = _inception(path).to(device)
    sha256 = file_hash(path)
    standard = standard or sha256.startswith("6726825d")
    note = (
        "Inception features (torch-fidelity), comparable with published figures"
        if standard
        else "Inception with other weights"
    )
    return Extractor("inception", sha256, note, lambda images: inception(images.to(device)))


def _inception(path: Path) -> nn.Module:
    """Load torch-fidelity's Inception network."""
    require_extra("eval", "torch_fidelity")
    make_torchvision_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles any object, so make sure that the file holds only tensors
    validate_finite(path, read_tensors(path))
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise ConfigError(f"{path}: not the weights of this Inception network ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Features:
    """The features of an image set.

    Attributes:
        features: float32 [N, D].
        logits: float32 [N, K].
        extractor: the identity of the extractor.
        source: what messages call the image set.
    """

    features: Tensor
    logits: Tensor
    extractor: str
    source: str

    def __len__(self) -> int:
        return len(self.features)


def default_cache() -> Path:
    """The folder where features are cached by default."""
    return cache_root() / "qdiff" / "features"


def extract(images: Selected, extractor: Extractor, cache: Path, batch_size: int = 64) -> Features:
    """Read the features of all images from the cache, or compute them chunk by chunk.

    Finished chunks survive an interruption. The name of the file in the cache is a hash of the images' contents, the
    extractor's weights and the chunks, so that other images never get old features. With several processes, process
    i modulo their number computes chunk i. One chunk of images and all features are in memory at once.

    Args:
        images: the images.
        extractor: the extractor.
        cache: the folder of the cache, which all processes must share.
        batch_size: the number of images in a chunk.

    Raises:
        ConfigError: an image cannot be read, features hold NaN or infinity, or the file in the cache is damaged or was
            made from other images.
    """
    key = {"extractor": extractor.identity, "images_sha256": images.hash, "count": len(images), "chunk": batch_size}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path, parts = cache / f"{name}.safetensors", cache / f"{name}.parts"
    if not path.is_file():
        message = None
        try:
            _extract_parts(images, extractor, parts, batch_size)
        except ConfigError as error:
            message = str(error)
        if (message := distributed.any_failed(message)) is not None:
            raise ConfigError(message)
        if distributed.rank() == 0:
            _merge(parts, path, key)
        distributed.barrier()
    found = _read(path, key, images.name)
    distributed.barrier()
    return found


@torch.no_grad()
def _extract_parts(images: Selected, extractor: Extractor, parts: Path, batch_size: int) -> None:
    """Write the features of this process's chunks, each to a file in the folder `parts`."""
    chunks = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    todo = [
        i
        for i in range(len(chunks))
        if i % distributed.world() == distributed.rank() and not (parts / _part_name(i)).is_file()
    ]
    with tqdm(
        total=sum(len(chunks[i]) for i in todo), desc=f"features ({extractor.name})", unit="image", disable=not todo
    ) as progress:
        for i in todo:
            features, logits = (part.float().cpu().contiguous() for part in extractor.run(images.read(chunks[i])))
            if not (torch.isfinite(features).all() and torch.isfinite(logits).all()):
                where = f"in images {chunks[i][0]} to {chunks[i][-1]}"
                raise NonFiniteError(f"{extractor.name}: features that are not finite numbers, {where}")
            with atomic_write(parts / _part_name(i)) as temporary:
                save_file({"features": features, "logits": logits}, temporary)
            progress.update(len(chunks[i]))


def _part_name(index: int) -> str:
    return f"{index:08d}.safetensors"


def _merge(parts: Path, path: Path, key: dict) -> None:
    """Merge all parts into one file. If parts are missing, another evaluation of the same images has merged them."""
    files = [parts / _part_name(i) for i in range(-(-key["count"] // key["chunk"]))]
    if path.is_file() and not all(file.is_file() for file in files):
        return
    merged: dict[str, Tensor] = {}
    for number, file in enumerate(files):  # each part is copied into its place, so that nothing is in memory twice
        for name, part in read_tensors(file).items():
            whole = merged.setdefault(name, torch.empty(key["count"], part.shape[1]))
            whole[number * key["chunk"] :][: len(part)] = part
    with atomic_write(path) as temporary:
        save_file(merged, temporary, metadata={"key": json.dumps(key, sort_keys=True)})
    shutil.rmtree(parts, ignore_errors=True)


def _read(path: Path, key: dict, source: str) -> Features:
    """Read a file of the cache and check that it belongs to `key`."""
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("key", "{}"))
            tensors = {name: file.get_tensor(name) for name in ("features", "logits")}
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: a damaged cache file ({error}); remove it") from None
    for name, expected in key.items():
        if stored.get(name) != expected:
            raise ConfigError(
                f"{path}: made from other images: {name} is {stored.get(name)}, expected {expected}; remove it"
            )
    if not len(tensors["features"]) == len(tensors["logits"]) == key["count"]:
        raise ConfigError(f"{path}: features of {len(tensors['features'])} images, expected {key['count']}; remove it")
    if (name := first_not_finite(tensors)) is not None:
        raise NonFiniteError(f"{path}: {name} that are not finite numbers; remove it")
    return Features(tensors["features"], tensors["logits"], key["extractor"], source)
