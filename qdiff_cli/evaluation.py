"""The figures of a set of images: what evaluate.py prints and reproduce.py puts into tables."""

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
from qdiff.utils.devices import select_device
from qdiff.utils.extras import require_extra
from qdiff.utils.files import check_writable
from qdiff_cli.images import load_metadata
from qdiff_cli.options import Parser, add_device_options, positive

UNBIASED_FROM = 10_000  # images; with fewer, FID is biased upwards by more than differences between methods


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated and how; `evaluation_parser` describes the options of the same names.

    Attributes:
        reference: what the images are compared with: images or saved statistics.
        against: images of full precision from the same noises.
        metrics: the figures asked for; None: all that can be had.
        extractor: inception or lite0.
        weights: the extractor's weights; None: fetched, or the installed package's.
        count: take this number of images; None: all.
        crop: cut the reference to centered squares of this size.
        clip: the folder of a CLIP model.
        prompts: the file of the prompts; None: those inside the PNG files.
        npz, save_statistics, output: files to write besides.
        cache: where features are kept.
        batch_size: images of one batch.
        device: where the networks work.
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
    """The parser of evaluate.py."""
    parser = Parser(description)
    parser.add_argument("images", nargs="?", help="what is evaluated (or a sampling command after --)")
    parser.add_argument("--reference", help="what it is compared with: images or saved statistics")
    words = "images of full precision from the same noises: PSNR, SSIM, a perceptual distance"
    parser.add_argument("--against", help=words)
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that can be had")
    words = "lite0: offline, not comparable with published FID"
    parser.add_argument("--extractor", choices=EXTRACTORS, default="inception", help=words)
    words = "the extractor's weights (default: fetched, or the installed package's)"
    parser.add_argument("--weights", type=Path, help=words)
    parser.add_argument("--count", type=positive, help="take only this number of images (default: all)")
    words = "cut the reference to centered squares of this size, as latent diffusion does"
    parser.add_argument("--crop", type=positive, help=words)
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    words = "the prompts, one a line for each image (default: those inside the PNG files)"
    parser.add_argument("--prompts", type=Path, help=words)
    parser.add_argument("--npz", type=Path, help="also write the images as .npz for the ADM evaluator")
    words = "also write mean and covariance of the images' features"
    parser.add_argument("--save_statistics", type=Path, help=words)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where features are kept")
    parser.add_argument("--batch_size", type=positive, default=64)
    add_device_options(parser)
    return parser


def open_reference(config: EvaluationConfig) -> Selected | Statistics | None:
    """Saved statistics, or images that are not read yet."""
    if config.reference is None:
        return None
    path = Path(config.reference)
    if path.suffix == ".npz" and path.is_file() and (found := load_statistics(path)) is not None:
        return found
    images = Selected(open_images(config.reference), crop=config.crop)
    if len(images) < 2:
        raise ConfigError(f"--reference {images.name}: 1 image, expected at least 2")
    return images


def validate_inputs(config: EvaluationConfig) -> None:
    """Raise before a long sampling what would be raised after it: weights, reference, images and prompts that do not
    fit.

    The features of the reference are made, and kept, here.
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
        extract(reference, extractor, config.cache, config.batch_size)  # a broken image is found now
    for path in (config.npz, config.save_statistics, config.output):
        if path:
            check_writable(path)


def _extractor(config: EvaluationConfig) -> Extractor:
    return load_extractor(config.extractor, select_device(config.device), config.weights)


def open_others(config: EvaluationConfig, count: int) -> Selected | None:
    """The images of --against, which must be as many as those that are evaluated."""
    others = Selected(open_images(config.against), config.count) if config.against else None
    if others is not None and len(others) != count:
        raise ConfigError(f"--against {others.name}: {len(others)} images, expected {count} as there are to evaluate")
    return others


def validate_count(config: EvaluationConfig, total: int) -> None:
    """Raise ConfigError before `total` images are sampled if they would be too few."""
    if config.count and config.count > total:
        raise ConfigError(f"--count {config.count}: the sampling command makes {total} images")
    open_others(config, config.count or total)
    if config.prompts:
        prompts_for(config.prompts, config.count or total)


def validate_metrics(config: EvaluationConfig) -> None:
    """Raise ConfigError for figures that cannot be had from this reference, and for a crop without effect."""
    reference = open_reference(config)
    possible = {"is"} if reference is None else {"is", "fid"} if isinstance(reference, Statistics) else set(METRICS)
    if lacking := [name for name in config.metrics or [] if name not in possible]:
        expected = "a --reference" if reference is None else "images as the --reference"
        raise ConfigError(f"--metrics {' '.join(lacking)}: expected {expected}")
    if config.crop and not isinstance(reference, Selected):
        raise ConfigError("--crop: expected images as the --reference")


def pairs(images: Selected, others: Selected, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of both sets, which must have one shape."""
    for batch, reference in zip(images.batches(size), others.batches(size), strict=True):
        if reference.shape != batch.shape:
            raise ConfigError(
                f"--against {others.name}: images of {list(reference.shape[2:])}, expected {list(batch.shape[2:])}"
            )
        yield batch, reference


def prompts_for(file: Path, count: int) -> list[str]:
    """The prompts of a file, one for each of `count` images; blank lines do not count, as for txt2img.py."""
    prompts = read_prompts(file)
    if len(prompts) < count:
        raise ConfigError(f"--prompts {file}: {len(prompts)} prompts, expected one for each of {count} images")
    return prompts


def load_prompts(images: Selected, file: Path | None) -> list[str]:
    """One prompt for each image."""
    return prompts_inside(images) if file is None else prompts_for(file, len(images))


def prompts_inside(images: Selected) -> list[str]:
    """The prompts that txt2img.py writes into its PNG files."""
    files = getattr(images.images, "files", [])[: len(images)]
    found = [prompt for file in files if (prompt := load_metadata(file).get("prompt")) is not None]
    if not found or len(found) < len(files):
        raise ConfigError(f"--clip: {images.name} has no prompts inside its images; give them by --prompts")
    return found


def evaluate(config: EvaluationConfig, source: str | Path) -> dict[str, Any]:
    """All figures asked for, of the images at `source`; on every process the same."""
    images = Selected(open_images(source), config.count)
    others = open_others(config, len(images))
    if others is not None:
        _validate_order(images, others)
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
    found = extract(images, extractor, config.cache, config.batch_size)

    def figures_of_all() -> dict[str, float]:
        more = compute(found, reference, tuple(config.metrics or METRICS))
        if others is not None:
            lite0 = load_lite0().to(select_device(config.device))
            more |= asdict(image_similarity(pairs(images, others, config.batch_size), lite0))
        if clip is not None:
            texts = iter(prompts)
            for batch in images.batches(config.batch_size):
                clip.add(batch, list(islice(texts, len(batch))))
            more["clip"] = clip.mean
        return more

    figures: dict[str, Any] = {"images": str(source), "reference": config.reference, "count": len(images)}
    figures["extractor"] = extractor.identity
    if reference is not None and config.extractor == "inception":
        figures["reference_kind"] = kind
    figures |= distributed.run_on_first(figures_of_all)
    if config.save_statistics and distributed.rank() == 0:
        save_statistics(config.save_statistics, statistics_of(found))
    sizes = [len(found), len(reference) if isinstance(reference, Features) else 0]
    figures["note"] = _note(figures, extractor, max(sizes), others is not None)
    return figures


def _validate_order(images: Selected, others: Selected) -> None:
    """Raise ConfigError if two sets of images have other names, or the same in another order."""
    first, second = images.names(), others.names()
    if first and second and first != second:
        there, here = next(pair for pair in zip(second, first, strict=True) if pair[0] != pair[1])
        raise ConfigError(
            f"--against {others.name}: {there} stands where {images.name} has {here}; expected the same names"
        )


def _note(figures: dict[str, Any], extractor: Extractor, largest: int, has_similarity: bool) -> str:
    """What a reader of the figures must know."""
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
        warning = "FID (upwards) and Inception score are biased with so few: compare them only with those of as many"
        note += f"; {figures['count']} images: {warning}"
    return note
