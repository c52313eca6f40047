"""The figures of a set of images. evaluate.py prints them, and reproduce.py puts them into tables."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditions import read_prompts
from qdiff.errors import ConfigError
from qdiff.evaluation.clip import ClipScore
from qdiff.evaluation.features import EXTRACTORS, Extractor, Features, default_cache, extract, load_extractor
from qdiff.evaluation.images import Selected, open_images
from qdiff.evaluation.lite0 import load_lite0
from qdiff.evaluation.metrics import (
    METRICS,
    OURS,
    PR_IMAGES,
    Statistics,
    compute,
    expect_extractor,
    load_statistics,
    save_statistics,
    statistics_of,
)
from qdiff.evaluation.similarity import image_similarity
from qdiff.utils import distributed
from qdiff.utils.devices import float32_products, select_device
from qdiff.utils.extras import require_extra
from qdiff.utils.files import check_writable
from qdiff_cli.images import load_metadata
from qdiff_cli.options import Parser, add_device_options, positive

# With fewer images, the upward bias of FID is larger than the differences between methods.
UNBIASED_FROM = 10_000


@dataclass(frozen=True)
class EvaluationConfig:
    """How images are evaluated. `evaluation_parser` has an option for each attribute.

    Attributes:
        reference: the reference images, or saved statistics of them.
        against: full-precision images from the same noise samples.
        metrics: the metrics to compute; None: all that are possible with the reference.
        extractor: inception or lite0.
        weights: the weights of the extractor; None: download them, or take those of an installed package.
        count: the number of images to evaluate; None: all.
        crop: cut the reference to centered squares of this size, in pixels.
        clip: the folder of a CLIP model.
        prompts: the file of the prompts; None: read them from the PNG files.
        npz: the .npz file to write the images to.
        save_statistics: the file to write the statistics of the features to.
        output: the JSON file to write the figures to.
        cache: the folder of cached features.
        batch_size: images of one batch.
        device: auto | cpu | cuda | mps.
    """

    reference: str | None = None
    against: str | None = None
    metrics: tuple[str, ...] | list[str] | None = None
    extractor: str = "inception"
    weights: Path | None = None
    count: int | None = None
    crop: int | None = None
    clip: Path | None = None
    prompts: Path | None = None
    npz: Path | None = None
    save_statistics: Path | None = None
    output: Path | None = None
    cache: Path = field(default_factory=default_cache)
    batch_size: int = 64
    device: str = "auto"


def evaluation_parser(description: str) -> Parser:
    """The parser of evaluate.py; `description` is the first line of its help."""
    parser = Parser(description)
    parser.add_argument("images", nargs="?", help="images to evaluate (or a sampling command after --)")
    parser.add_argument("--reference", help="reference images, or saved statistics of them")
    help_text = "full-precision images from the same noise samples, for the similarity to full precision"
    parser.add_argument("--against", help=help_text)
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="metrics (default: all that are possible)")
    help_text = "network for the features; lite0 works offline, but is not comparable with published FID"
    parser.add_argument("--extractor", choices=EXTRACTORS, default="inception", help=help_text)
    help_text = "weights of the extractor (default: downloaded, or from an installed package)"
    parser.add_argument("--weights", type=Path, help=help_text)
    parser.add_argument("--count", type=positive, help="number of images to evaluate (default: all)")
    help_text = "cut the reference to centered squares of this size, in pixels, as latent diffusion does"
    parser.add_argument("--crop", type=positive, help=help_text)
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    help_text = "file of prompts, one line for each image (default: the prompts inside the PNG files)"
    parser.add_argument("--prompts", type=Path, help=help_text)
    parser.add_argument("--npz", type=Path, help=".npz file to write the images to, for the ADM evaluator")
    help_text = "file to write the mean and covariance of the features to"
    parser.add_argument("--save_statistics", type=Path, help=help_text)
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of cached features")
    parser.add_argument("--batch_size", type=positive, default=64, help="images of one batch")
    add_device_options(parser)
    return parser


def open_reference(config: EvaluationConfig) -> Selected | Statistics | None:
    """Open the reference: saved statistics, or images, which are not read yet; None if there is no reference.

    Raises:
        ConfigError: the reference cannot be read, or has fewer than 2 images.
    """
    if config.reference is None:
        return None
    path = Path(config.reference)
    if path.suffix == ".npz" and path.is_file() and (statistics := load_statistics(path)) is not None:
        return statistics
    images = Selected(open_images(config.reference), crop=config.crop)
    if len(images) < 2:
        raise ConfigError(f"--reference {images.name}: 1 image, expected at least 2")
    return images


def validate_inputs(config: EvaluationConfig) -> None:
    """Check weights, reference, images and prompts before a long sampling. Computes the features of the reference.

    Raises:
        ConfigError: an input cannot be used.
    """
    require_extra("eval", "torch_fidelity", *(["torchmetrics"] if config.against else []))
    reference = open_reference(config)
    if config.against:
        open_images(config.against)
        load_lite0()
    if config.clip:
        ClipScore(config.clip, torch.device("cpu"))
    if config.prompts:
        read_prompts(config.prompts)
    extractor = _extractor(config)
    if isinstance(reference, Statistics):
        expect_extractor(reference, extractor.identity)
    elif reference is not None:
        extract(reference, extractor, config.cache, config.batch_size)  # finds a broken image now
    for path in (config.npz, config.save_statistics, config.output):
        if path:
            check_writable(path)


def _extractor(config: EvaluationConfig) -> Extractor:
    return load_extractor(config.extractor, select_device(config.device), config.weights)


def open_full_precision_images(config: EvaluationConfig, count: int) -> Selected | None:
    """Open the images of --against; None if there are none.

    Args:
        config: the evaluation.
        count: the number of images that are evaluated.

    Raises:
        ConfigError: --against has another number of images.
    """
    if not config.against:
        return None
    images = Selected(open_images(config.against), config.count)
    if len(images) != count:
        raise ConfigError(f"--against {images.name}: {len(images)} images, expected {count} as there are to evaluate")
    return images


def validate_count(config: EvaluationConfig, total: int) -> None:
    """Raise ConfigError if the `total` images that will be sampled are too few for the options."""
    if config.count and config.count > total:
        raise ConfigError(f"--count {config.count}: the sampling command makes {total} images")
    open_full_precision_images(config, config.count or total)
    if config.prompts:
        read_prompts_for(config.prompts, config.count or total)


def validate_metrics(config: EvaluationConfig) -> None:
    """Raise ConfigError for metrics that are not possible with this reference, and for a crop without effect."""
    reference = open_reference(config)
    possible = {"is"} if reference is None else {"is", "fid"} if isinstance(reference, Statistics) else set(METRICS)
    if impossible := [name for name in config.metrics or [] if name not in possible]:
        expected = "a --reference" if reference is None else "images as the --reference"
        raise ConfigError(f"--metrics {' '.join(impossible)}: expected {expected}")
    if config.crop and not isinstance(reference, Selected):
        raise ConfigError("--crop: expected images as the --reference")


def paired_batches(images: Selected, full: Selected, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the evaluated and of the full-precision images, which must have the same shape."""
    for batch, full_batch in zip(images.batches(batch_size), full.batches(batch_size), strict=True):
        if full_batch.shape != batch.shape:
            raise ConfigError(
                f"--against {full.name}: images of {list(full_batch.shape[2:])}, expected {list(batch.shape[2:])}"
            )
        yield batch, full_batch


def read_prompts_for(file: Path, count: int) -> list[str]:
    """Read the prompts of a file, at least `count` of them. Blank lines are skipped, as in txt2img.py."""
    prompts = read_prompts(file)
    if len(prompts) < count:
        raise ConfigError(f"--prompts {file}: {len(prompts)} prompts, expected one for each of {count} images")
    return prompts


def load_prompts(images: Selected, file: Path | None) -> list[str]:
    """The prompts of the images, from a file or from the images themselves."""
    return prompts_in_images(images) if file is None else read_prompts_for(file, len(images))


def prompts_in_images(images: Selected) -> list[str]:
    """The prompts that txt2img.py has written into its PNG files."""
    files = getattr(images.images, "files", [])[: len(images)]
    prompts = [prompt for file in files if (prompt := load_metadata(file).get("prompt")) is not None]
    if not prompts or len(prompts) < len(files):
        raise ConfigError(f"--clip: {images.name} has no prompts inside its images; give them by --prompts")
    return prompts


def evaluate(config: EvaluationConfig, source: str | Path) -> dict[str, Any]:
    """Evaluate images.

    Args:
        config: how they are evaluated.
        source: the images.

    Returns:
        The figures by name, the same on every process, with a note on how to read them.
    """
    with float32_products(select_device(config.device), tf32=False):
        return _evaluate(config, source)


def _evaluate(config: EvaluationConfig, source: str | Path) -> dict[str, Any]:
    images = Selected(open_images(source), config.count)
    full = open_full_precision_images(config, len(images))
    if full is not None:
        _validate_order(images, full)
    clip = ClipScore(config.clip, select_device(config.device)) if config.clip else None
    prompts = load_prompts(images, config.prompts) if clip is not None else []
    extractor = _extractor(config)
    opened = open_reference(config)
    kind = opened.kind if isinstance(opened, Statistics) else OURS
    reference: Statistics | Features | None = None
    match opened:
        case Selected():
            reference = extract(opened, extractor, config.cache, config.batch_size)
        case Statistics():
            reference = opened
    features = extract(images, extractor, config.cache, config.batch_size)

    def compute_all() -> dict[str, float]:
        values = compute(features, reference, tuple(config.metrics or METRICS))
        if full is not None:
            lite0 = load_lite0().to(select_device(config.device))
            values |= asdict(image_similarity(paired_batches(images, full, config.batch_size), lite0))
        if clip is not None:
            remaining = iter(prompts)
            for batch in images.batches(config.batch_size):
                clip.add(batch, list(islice(remaining, len(batch))))
            values["clip"] = clip.mean
        return values

    figures: dict[str, Any] = {"images": str(source), "reference": config.reference, "count": len(images)}
    figures["extractor"] = extractor.identity
    if reference is not None and config.extractor == "inception":
        figures["reference_kind"] = kind
    figures |= distributed.run_on_first(compute_all)
    if config.save_statistics and distributed.rank() == 0:
        save_statistics(config.save_statistics, statistics_of(features))
    sizes = [len(features), len(reference) if isinstance(reference, Features) else 0]
    figures["note"] = _note(figures, extractor, max(sizes), full is not None)
    return figures


def _validate_order(images: Selected, full: Selected) -> None:
    """Raise ConfigError if the names of the images differ, or come in another order."""
    names, full_names = images.names(), full.names()
    if names and full_names and names != full_names:
        name, full_name = next(pair for pair in zip(names, full_names, strict=True) if pair[0] != pair[1])
        raise ConfigError(
            f"--against {full.name}: {full_name} stands where {images.name} has {name}; expected the same names"
        )


def _note(figures: dict[str, Any], extractor: Extractor, largest: int, has_similarity: bool) -> str:
    """The note on how to read the figures.

    Args:
        figures: the figures.
        extractor: the network that computed the features.
        largest: the number of images of the larger set.
        has_similarity: the figures have a similarity to full precision.
    """
    note, kind = extractor.note, figures.get("reference_kind", OURS)
    if kind != OURS:
        note = (
            f"Inception features made by {OURS}; the reference: {kind}; "
            "comparable with figures from the same reference alone"
        )
    if "precision" in figures and largest > PR_IMAGES:
        note += f"; precision and recall of at most {PR_IMAGES} images of each"
    if has_similarity:
        note += "; perceptual: in lite0 features"
    if {"fid", "is"} & set(figures) and figures["count"] < UNBIASED_FROM:
        warning = "FID (upwards) and Inception score are biased: compare them only with the same number of images"
        note += f"; with {figures['count']} images {warning}"
    return note
