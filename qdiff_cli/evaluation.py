"""The figures of a set of images: what evaluate.py prints and reproduce.py puts into tables."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from ldm.conditions import read_prompts
from qdiff.errors import ConfigError
from qdiff.evaluation.clip import ClipScore
from qdiff.evaluation.features import EXTRACTORS, Features, default_cache, extract, load_extractor
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
from qdiff.utils.extras import require_extra
from qdiff.utils.files import check_writable
from qdiff_cli.images import load_metadata
from qdiff_cli.options import Parser, add_device_options, positive, select_device
from qdiff_cli.running import Ranks

UNBIASED_FROM = 10_000  # images; with fewer, FID is biased upwards by more than differences between methods


def evaluation_parser(description: str) -> Parser:
    """The options of evaluate.py."""
    parser = Parser(description)
    parser.add_argument("images", nargs="?", help="what is evaluated (or a sampling command after --)")
    parser.add_argument("--reference", help="what it is compared with: images or saved statistics")
    parser.add_argument(
        "--against", help="images of full precision from the same noises: PSNR, SSIM, a perceptual distance"
    )
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that can be had")
    parser.add_argument(
        "--extractor", choices=EXTRACTORS, default="inception", help="lite0: offline, not comparable with published FID"
    )
    parser.add_argument(
        "--weights", type=Path, help="the extractor's weights (default: fetched, or the installed package's)"
    )
    parser.add_argument("--count", type=positive, help="take the first so many images (default: all)")
    parser.add_argument(
        "--crop", type=positive, help="cut the reference to centered squares of this size, as latent diffusion does"
    )
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    parser.add_argument(
        "--prompts", type=Path, help="the prompts, one a line for each image (default: those inside the PNG files)"
    )
    parser.add_argument("--npz", type=Path, help="also write the images as .npz for the ADM evaluator")
    parser.add_argument("--save_statistics", type=Path, help="also write mean and covariance of the images' features")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where features are kept")
    parser.add_argument("--batch_size", type=positive, default=64)
    add_device_options(parser)
    return parser


def open_reference(args: argparse.Namespace) -> Selected | Statistics | None:
    """Saved statistics, or images that are not read yet."""
    if args.reference is None:
        return None
    path = Path(args.reference)
    if path.suffix == ".npz" and path.is_file() and (found := load_statistics(path)) is not None:
        return found
    images = Selected(open_images(args.reference), crop=args.crop)
    if len(images) < 2:
        raise ConfigError(f"--reference {images.name}: 1 image, expected at least 2")
    return images


def check_inputs(args: argparse.Namespace) -> None:
    """Raise before a long sampling what would be raised after it: weights, reference, images and prompts that do not fit.

    The features of the reference are made, and kept, here.
    """
    require_extra("eval", "torch_fidelity", *(["torchmetrics"] if args.against else []))
    reference = open_reference(args)
    if args.against:
        open_images(args.against)
        load_lite0()
    if args.clip:
        ClipScore(args.clip, torch.device("cpu"))
    if args.prompts:
        read_prompts(args.prompts)
    extractor = load_extractor(args.extractor, select_device(args.device), args.weights)  # it may be fetched
    if isinstance(reference, Statistics):
        expect_extractor(reference, extractor.identity)
    elif reference is not None:
        extract(reference, extractor, args.cache, args.batch_size)  # kept; a broken image is found now
    for path in (args.npz, args.save_statistics, args.output):
        if path:
            check_writable(path)


def open_others(args: argparse.Namespace, count: int) -> Selected | None:
    """The images of --against, which must be as many as those that are evaluated."""
    others = Selected(open_images(args.against), args.count) if args.against else None
    if others is not None and len(others) != count:
        raise ConfigError(f"--against {others.name}: {len(others)} images, expected {count} as there are to evaluate")
    return others


def check_count(args: argparse.Namespace, total: int) -> None:
    """Raise ConfigError before `total` images are made where they would be too few."""
    if args.count and args.count > total:
        raise ConfigError(f"--count {args.count}: the sampling command makes {total} images")
    open_others(args, args.count or total)
    if args.prompts:
        prompts_for(args.prompts, args.count or total)


def check_wishes(args: argparse.Namespace) -> None:
    """Raise ConfigError for options of the command that would have no effect."""
    reference = open_reference(args)
    possible = {"is"} if reference is None else {"is", "fid"} if isinstance(reference, Statistics) else set(METRICS)
    if lacking := [name for name in args.metrics or [] if name not in possible]:
        expected = "a --reference" if reference is None else "images as the --reference"
        raise ConfigError(f"--metrics {' '.join(lacking)}: expected {expected}")
    if args.crop and not isinstance(reference, Selected):
        raise ConfigError("--crop: expected images as the --reference")


def pairs(images: Selected, others: Selected, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of both, which must have one shape."""
    for batch, reference in zip(images.batches(size), others.batches(size), strict=True):
        if reference.shape != batch.shape:
            raise ConfigError(
                f"--against {others.name}: images of {list(reference.shape[2:])}, expected {list(batch.shape[2:])}"
            )
        yield batch, reference


def prompts_for(file: Path, count: int) -> list[str]:
    """The prompts of a file, one for each of `count` images (blank lines are none, as for txt2img.py)."""
    words = read_prompts(file)
    if len(words) < count:
        raise ConfigError(f"--prompts {file}: {len(words)} prompts, expected one for each of {count} images")
    return words


def load_prompts(images: Selected, file: Path | None) -> list[str]:
    """One prompt for each image."""
    return prompts_inside(images) if file is None else prompts_for(file, len(images))


def prompts_inside(images: Selected) -> list[str]:
    """The prompts that txt2img.py writes into its PNG files."""
    found = [load_metadata(file).get("prompt") for file in getattr(images.images, "files", [])[: len(images)]]
    if not found or None in found:
        raise ConfigError(f"--clip: {images.name} has no prompts inside its images; give them by --prompts")
    return found


def evaluate(args: argparse.Namespace, source: str | Path) -> dict:
    """All figures asked for, of the images at `source`; on every process the same."""
    device = select_device(args.device)
    images = Selected(open_images(source), args.count)
    others = open_others(args, len(images))
    if others is not None and others.names() and images.names() and others.names() != images.names():
        first = next(pair for pair in zip(others.names(), images.names(), strict=True) if pair[0] != pair[1])
        raise ConfigError(
            f"--against {others.name}: {first[0]} stands where {images.name} has {first[1]}; expected the same names"
        )
    clip = ClipScore(args.clip, device) if args.clip else None
    prompts = load_prompts(images, args.prompts) if clip is not None else []
    extractor = load_extractor(args.extractor, device, args.weights)

    def features_of(selected: Selected) -> Features:
        return extract(selected, extractor, args.cache, args.batch_size)

    reference = open_reference(args)
    kind = reference.kind if isinstance(reference, Statistics) else OURS
    if isinstance(reference, Selected):
        reference = features_of(reference)
    found = features_of(images)
    figures: dict = {
        "images": str(source),
        "reference": args.reference,
        "count": len(images),
        "extractor": extractor.identity,
    }

    def rest() -> dict[str, float]:
        more = compute(found, reference, tuple(args.metrics or METRICS))
        if others is not None:
            more |= asdict(image_similarity(pairs(images, others, args.batch_size), load_lite0().to(device)))
        if clip is not None:
            words = iter(prompts)
            for batch in images.batches(args.batch_size):
                clip.add(batch, list(islice(words, len(batch))))
            more["clip"] = clip.mean
        return more

    if reference is not None and args.extractor == "inception":
        figures["reference_kind"] = kind
    figures |= Ranks.from_environment().from_first(rest)
    if args.save_statistics and Ranks.from_environment().rank == 0:
        save_statistics(args.save_statistics, statistics_of(found))
    figures["note"] = extractor.note
    if figures.get("reference_kind", OURS) != OURS:
        figures["note"] = (
            f"Inception features made by {OURS}; the reference: {kind}; comparable with figures from the same reference alone"
        )
    if "precision" in figures and max(len(found), len(reference)) > PR_IMAGES:
        figures["note"] += f"; precision and recall of at most {PR_IMAGES} images of each"
    if others is not None:
        figures["note"] += "; perceptual: in lite0 features"
    if {"fid", "is"} & set(figures) and len(images) < UNBIASED_FROM:
        words = "FID (upwards) and Inception score are biased with so few: compare them only with those of as many"
        figures["note"] += f"; {len(images)} images: {words}"
    return figures
