"""How near images are to others from the same noises."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from qdiff.evaluation.lite0 import EfficientNetLite0, perceptual_distance
from qdiff.evaluation.trajectory import psnr, ssim


@dataclass(frozen=True)
class Likeness:
    """psnr in dB, of the mean squared error over all images; ssim and perceptual (lite0 features): means over the images."""

    psnr: float
    ssim: float
    perceptual: float


def likeness(pairs: Iterable[tuple[Tensor, Tensor]], lite0: EfficientNetLite0) -> Likeness:
    """Of batches of uint8 images [N, 3, H, W] and those they are compared with, one batch in memory at a time.

    lite0: `qdiff.evaluation.lite0.load_lite0()`, on the device where it is to run.
    """
    count = 0
    error = similarity = distance = 0.0
    device = next(lite0.parameters()).device
    for images, others in pairs:
        count += len(images)
        error += 10 ** (-psnr(images, others) / 10) * len(images)
        similarity += ssim(images, others) * len(images)
        distance += perceptual_distance(lite0, images.to(device), others.to(device)).sum().item()
    decibels = -10 * math.log10(error / count) if error else math.inf
    return Likeness(decibels, similarity / count, distance / count)
