"""Metrics between two sets of image features, computed by torch-fidelity, and statistics that are stored in files."""

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qdiff.errors import ConfigError, NonFiniteError
from qdiff.evaluation.features import Features
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.extras import require_extra
from qdiff.utils.files import atomic_write

METRICS = ("fid", "is", "kid", "pr")
SEED = 2020  # the default of torch-fidelity
KID_SUBSET, KID_SUBSETS, IS_SPLITS, NEIGHBORS = 1000, 100, 10, 3
PART = 10_000  # rows of features that are centered and multiplied at once
# Precision and recall use at most this many images of each set, spread evenly over it, because they compare all pairs.
PR_IMAGES = 50_000
PR_DISTANCES = 2**25  # distances that are in memory at once

OURS = "torch-fidelity's resize and Inception weights"
INCEPTION_DIM = 2048
# clean-fid names its files NAME_MODE_SPLIT_RESOLUTION.npz
CLEAN_FID = re.compile(r"^.+_(clean|legacy_tensorflow|legacy_pytorch)_[^_]+_(na|\d+)$", re.IGNORECASE)
KINDS = {  # of statistics, by the MODE in their file's name; None: the name is not one of clean-fid's
    "clean": "clean-fid's bicubic resize with antialiasing (mode clean) and its Inception weights",
    "legacy_tensorflow": (
        "clean-fid's bilinear resize of TensorFlow 1 (mode legacy_tensorflow) and its Inception weights"
    ),
    "legacy_pytorch": (
        "PyTorch's bilinear resize without antialiasing (clean-fid's mode legacy_pytorch) and pytorch-fid's weights"
    ),
    None: "as pytorch-fid saves them: PyTorch's bilinear resize without antialiasing and pytorch-fid's weights",
}


# what NumPy raises for damaged or foreign files
_UNREADABLE = (ValueError, TypeError, AttributeError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of an image set.

    Attributes:
        mu: the mean, float64 [D].
        sigma: the covariance, float64 [D, D].
        extractor: the identity of the extractor (`qdiff.evaluation.features.Extractor`).
        count: the number of images; 0 if a file of another evaluator does not say it.
        source: what messages call the image set.
        kind: the resize and the network weights behind the features.
    """

    mu: np.ndarray
    sigma: np.ndarray
    extractor: str
    count: int
    source: str
    kind: str = OURS


def statistics_of(found: Features) -> Statistics:
    """Compute mean and unbiased covariance, in float64 and part by part, so that no copy of all features is needed."""
    mu = sum(part.double().sum(0) for part in found.features.split(PART)) / len(found)
    products = torch.zeros(len(mu), len(mu), dtype=torch.float64)
    for part in found.features.split(PART):
        centered = part.double() - mu
        products += centered.T @ centered
    return Statistics(mu.numpy(), (products / (len(found) - 1)).numpy(), found.extractor, len(found), found.source)


def save_statistics(path: Path, values: Statistics) -> None:
    """Write an `.npz` file with mean, covariance, extractor, number of images and source."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file, mu=values.mu, sigma=values.sigma, extractor=values.extractor, count=values.count, source=values.source
        )


def load_statistics(path: Path) -> Statistics | None:
    """Read stored statistics.

    Files of clean-fid and pytorch-fid, with mu [2048] and sigma [2048, 2048], name no extractor. Their `kind` follows
    from the file's name.

    Args:
        path: an `.npz` file.

    Returns:
        The statistics; None if the file holds images. An ADM reference holds both, and its statistics are not used.

    Raises:
        ConfigError: the file cannot be read or holds something else, or the statistics have another size.
        NonFiniteError: the statistics hold NaN or infinity.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" in file.files:
                return None
            if not {"mu", "sigma"} <= set(file.files):
                raise ConfigError(
                    f"{path}: expected arr_0 (images) or mu and sigma, found {', '.join(file.files) or 'nothing'}"
                )
            values = {
                name: file[name] for name in ("mu", "sigma", "extractor", "count", "source") if name in file.files
            }
            mu, sigma = (np.asarray(values[name], dtype=np.float64) for name in ("mu", "sigma"))
            own = "extractor" in values
            found = Statistics(
                mu,
                sigma,
                extractor=str(values["extractor"].item()) if own else "inception",
                count=int(values["count"].item()) if own else 0,
                source=str(values["source"].item()) if own else str(path),
                kind=OURS if own else _kind_of(path),
            )
    except _UNREADABLE as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read as .npz ({error})") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or (not own and len(mu) != INCEPTION_DIM):
        size = "D" if own else INCEPTION_DIM
        raise ConfigError(
            f"{path}: mu {list(mu.shape)} and sigma {list(sigma.shape)}, expected [{size}] and [{size}, {size}]"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise NonFiniteError(f"{path}: statistics that are not finite numbers")
    return found


def _kind_of(path: Path) -> str:
    """The `kind` of statistics by another evaluator, by the name of their file."""
    named = CLEAN_FID.match(path.stem)
    return KINDS[named[1].lower() if named else None]


def expect_extractor(reference: Features | Statistics, identity: str) -> None:
    """Check which extractor made features or statistics.

    Args:
        reference: the features or statistics.
        identity: the expected extractor (`qdiff.evaluation.features.Extractor.identity`).

    Raises:
        ConfigError: another extractor made them.
    """
    if isinstance(reference, Statistics) and reference.kind != OURS:
        if not identity.startswith("inception "):
            raise ConfigError(
                f"{reference.source}: statistics of Inception features ({reference.kind}), "
                "expected the Inception extractor"
            )
    elif reference.extractor != identity:
        raise ConfigError(f"{reference.source}: made with the extractor {reference.extractor}, expected {identity}")


def compute(found: Features, reference: Features | Statistics | None, wanted: tuple[str, ...]) -> dict[str, float]:
    """Compute metrics of an image set.

    Args:
        found: the features of the images.
        reference: the features or statistics of the reference images. Statistics allow FID and IS only; None allows IS
            only.
        wanted: names from `METRICS`. Metrics that the reference does not allow are left out.

    Returns:
        The metrics by name.
        fid: Frechet distance (Heusel et al. 2017).
        is, is_std: Inception score over 10 splits (Salimans et al. 2016).
        kid, kid_std: kernel distance over 100 subsets of 1000 images, or of all images if a set is smaller (Binkowski
        et al. 2018).
        precision, recall: with 3 nearest neighbors (Kynkaanniemi et al. 2019), in the same features, for at most
        `PR_IMAGES` images of each set.

    Raises:
        ConfigError: the reference was made with another extractor, or a set has fewer than 2 images.
    """
    require_extra("eval", "torch_fidelity")
    make_torchvision_importable()
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    for images in (found, reference):
        if isinstance(images, Features) and len(images) < 2:
            raise ConfigError(f"{images.source}: {len(images)} image, expected at least 2")
    if reference is not None:
        expect_extractor(reference, found.extractor)
    result: dict[str, float] = {}
    if "is" in wanted:
        score = isc_features_to_metric(found.logits, min(IS_SPLITS, len(found)), True, SEED)
        result |= {"is": score["inception_score_mean"], "is_std": score["inception_score_std"]}
    if reference is None:
        return result
    if "fid" in wanted:
        statistics = reference if isinstance(reference, Statistics) else statistics_of(reference)
        both = [{"mu": each.mu, "sigma": each.sigma} for each in (statistics_of(found), statistics)]
        result["fid"] = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    if isinstance(reference, Statistics):
        return result
    if "kid" in wanted:
        size = min(KID_SUBSET, len(found), len(reference))
        options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
        score = kid_features_to_metric(found.features, reference.features, **options)
        result |= {"kid": score["kernel_inception_distance_mean"], "kid_std": score["kernel_inception_distance_std"]}
    if "pr" in wanted:
        pair = [images.features[:: -(-len(images) // PR_IMAGES)] for images in (found, reference)]
        neighbors = min(NEIGHBORS, *(len(features) - 1 for features in pair))
        rows = max(1, PR_DISTANCES // max(map(len, pair)))
        options = {"prc_neighborhood": neighbors, "prc_batch_size": rows, "save_cpu_ram": True, "verbose": False}
        score = prc_features_to_metric(*pair, **options)
        result |= {"precision": score["precision"], "recall": score["recall"]}
    return result
