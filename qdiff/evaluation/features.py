"""Features of images: extracted once a chunk, by any number of processes, and kept under a hash of what they were made from."""

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
from qdiff.checkpoint.reading import check_finite
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
    """uint8 images [N, 3, H, W] to `features` [N, D] and `logits` [N, K], float32.

    name, weights_sha256: say which one it is. note: what its figures may be compared with.
    """

    name: str
    weights_sha256: str
    note: str
    run: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def identity(self) -> str:
        return f"{self.name} {self.weights_sha256[:16]}"


def load_extractor(name: str, device: torch.device, weights: Path | None = None) -> Extractor:
    """`inception`: the network of the published FID (torch-fidelity's conversion), its weights given or fetched. `lite0`: offline.

    Raises:
        ConfigError: no weights to be had. CheckpointError: a damaged or foreign file.
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
    require_extra("eval", "torch_fidelity")
    make_torchvision_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    check_finite(
        path, read_tensors(path)
    )  # that library would unpickle anything; after this it is known to be tensors only
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise ConfigError(f"{path}: not the weights of this Inception network ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Features:
    """What an extractor made of images: features [N, D], logits [N, K], and of what."""

    features: Tensor
    logits: Tensor
    extractor: str
    source: str

    def __len__(self) -> int:
        return len(self.features)


def default_cache() -> Path:
    return cache_root() / "qdiff" / "features"


def extract(images: Selected, extractor: Extractor, cache: Path, batch_size: int = 64) -> Features:
    """Features of all images, from the cache or made now in chunks that an interruption does not lose.

    The name of the file in the cache is a hash of the images' contents, the extractor's weights and the chunks, so other images
    never meet old features. With several processes chunk i is made by process i modulo their number; all need the same cache folder. Memory
    is needed for a chunk of images and for the features.

    Raises:
        ConfigError: an image that cannot be read; a file in the cache that is damaged or was made from other images.
    """
    key = {"extractor": extractor.identity, "images_sha256": images.hash, "count": len(images), "chunk": batch_size}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path, parts = cache / f"{name}.safetensors", cache / f"{name}.parts"
    if not path.is_file():
        error = None
        try:
            _make_parts(images, extractor, parts, batch_size)
        except ConfigError as found:
            error = str(found)
        if (error := distributed.any_failed(error)) is not None:
            raise ConfigError(error)
        if distributed.rank() == 0:
            _merge(parts, path, key)
        distributed.barrier()
    found = _read(path, key, images.name)
    distributed.barrier()
    return found


@torch.no_grad()
def _make_parts(images: Selected, extractor: Extractor, parts: Path, batch_size: int) -> None:
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
                raise NonFiniteError(
                    f"{extractor.name}: features that are not finite numbers, in images {chunks[i][0]} to {chunks[i][-1]}"
                )
            with atomic_write(parts / _part_name(i)) as temporary:
                save_file({"features": features, "logits": logits}, temporary)
            progress.update(len(chunks[i]))


def _part_name(index: int) -> str:
    return f"{index:08d}.safetensors"


def _merge(parts: Path, path: Path, key: dict) -> None:
    """One file of all parts. Where parts are gone, another evaluation of the same images has merged them."""
    files = [parts / _part_name(i) for i in range(-(-key["count"] // key["chunk"]))]
    if path.is_file() and not all(file.is_file() for file in files):
        return
    merged: dict[str, Tensor] = {}
    for number, file in enumerate(files):  # into their place: nothing is held twice
        for name, part in read_tensors(file).items():
            whole = merged.setdefault(name, torch.empty(key["count"], part.shape[1]))
            whole[number * key["chunk"] :][: len(part)] = part
    with atomic_write(path) as temporary:
        save_file(merged, temporary, metadata={"key": json.dumps(key, sort_keys=True)})
    shutil.rmtree(parts, ignore_errors=True)


def _read(path: Path, key: dict, source: str) -> Features:
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
