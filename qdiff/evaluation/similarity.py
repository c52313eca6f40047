"""Similarity of images to reference images that were sampled from the same noise: PSNR, SSIM, perceptual distance."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.evaluation.lite0 import EfficientNetLite0, perceptual_distance
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.extras import require_extra


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of a batch.

    Args:
        images: uint8 [N, C, H, W].
        reference: uint8 [N, C, H, W].

    Returns:
        The ratio in dB, from the mean squared error over the whole batch; infinity if the images are equal.
    """
    error = (images.double() - reference.double()).square().mean()
    return (10 * torch.log10(255**2 / error)).item()


def ssim(images: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) with an 11x11 Gaussian window.

    Args:
        images: uint8 [N, C, H, W].
        reference: uint8 [N, C, H, W].

    Returns:
        The mean over the images; 1 if they are equal.

    Raises:
        MissingExtra: torchmetrics is not installed.
    """
    require_extra("eval", "torchmetrics")
    make_torchvision_importable()
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images.float(), reference.float(), data_range=255.0).item()


@dataclass(frozen=True)
class ImageSimilarity:
    """How similar images are to their references.

    Attributes:
        psnr: dB, from the mean squared error over all images.
        ssim: mean over the images.
        perceptual: distance of EfficientNet-Lite0 features, mean over the images.
    """

    psnr: float
    ssim: float
    perceptual: float


def image_similarity(pairs: Iterable[tuple[Tensor, Tensor]], lite0: EfficientNetLite0) -> ImageSimilarity:
    """Compare images with their references, holding one batch in memory at a time.

    Args:
        pairs: batches of (images, reference), uint8 [N, 3, H, W] each.
        lite0: `qdiff.evaluation.lite0.load_lite0()`, on the device where it is to run.

    Returns:
        The three measures over all batches.

    Raises:
        MissingExtra: torchmetrics is not installed.
    """
    count = 0
    squared_error = similarity = distance = 0.0
    device = next(lite0.parameters()).device
    for images, reference in pairs:
        count += len(images)
        squared_error += 10 ** (-psnr(images, reference) / 10) * len(images)
        similarity += ssim(images, reference) * len(images)
        distance += perceptual_distance(lite0, images.to(device), reference.to(device)).sum().item()
    decibels = -10 * math.log10(squared_error / count) if squared_error else math.inf
    return ImageSimilarity(decibels, similarity / count, distance / count)
