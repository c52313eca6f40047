"""Similarity of images to their references, which were sampled in full precision from the same noise samples."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qdiff.evaluation.lite0 import EfficientNetLite0, perceptual_distance
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.extras import require_extra

ISOLATED = 60  # of 255: an isolated pixel differs by more than this from the median of its neighborhood
IDENTITY = 20.0  # dB: an image whose PSNR is higher shows what its reference shows
SIMILARITY_DEFINITION = (
    f"Isolated px: pixels of all images with a channel more than {ISOLATED} of 255 from the median of its 3x3 "
    "neighborhood, where full precision has no such pixel within one pixel. Identity: share of the images with a PSNR "
    f"over {IDENTITY:.0f} dB."
)


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


def isolated_pixels(images: Tensor, reference: Tensor) -> Tensor:
    """Count the single wrong pixels, which a person sees first and which hardly change PSNR and SSIM.

    A pixel is isolated if one of its channels differs by more than `ISOLATED` from the median of that channel in its
    3x3 neighborhood. It is wrong if the reference has no isolated pixel within one pixel of it. Images are mirrored
    at their borders.

    Args:
        images: uint8 [N, C, H, W], with H and W of at least 2.
        reference: uint8 [N, C, H, W].

    Returns:
        The number of isolated wrong pixels in each image, int64 [N].
    """
    nearby = F.max_pool2d(_isolated(reference).float(), 3, stride=1, padding=1) > 0
    return (_isolated(images) & ~nearby).sum(dim=(1, 2))


def _isolated(images: Tensor) -> Tensor:
    """Which pixels of uint8 images [N, C, H, W] are isolated, bool [N, H, W]."""
    return ((images.short() - _median_of_neighborhood(images)).abs() > ISOLATED).any(dim=1)


def _median_of_neighborhood(images: Tensor) -> Tensor:
    """The median of the 3x3 neighborhood of every value of [N, C, H, W], with mirrored borders.

    The median of nine is the median of three values, if each column of three is sorted: the largest of the least, the
    median of the medians and the least of the largest. That is several times faster than `Tensor.median`.
    """
    height, width = images.shape[2:]
    rows, columns = (torch.tensor([1, *range(size), size - 2]) for size in (height, width))
    top, middle, bottom = (images[:, :, rows[i : i + height]] for i in range(3))
    least, most = torch.minimum(torch.minimum(top, middle), bottom), torch.maximum(torch.maximum(top, middle), bottom)
    parts = (least, _median_of_three(top, middle, bottom), most)
    (a, b, c), medians, (d, e, f) = ([part[..., columns[i : i + width]] for i in range(3)] for part in parts)
    largest_least, least_largest = torch.maximum(torch.maximum(a, b), c), torch.minimum(torch.minimum(d, e), f)
    return _median_of_three(largest_least, _median_of_three(*medians), least_largest)


def _median_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


def keeps_identity(images: Tensor, reference: Tensor) -> Tensor:
    """Tell which images show what their references show.

    The PSNR of a set hangs on the few images that become other ones. The share of images over a threshold does not.

    Args:
        images: uint8 [N, C, H, W].
        reference: uint8 [N, C, H, W].

    Returns:
        For each image whether its own PSNR is over `IDENTITY`, bool [N].
    """
    found = [psnr(image[None], reference_image[None]) for image, reference_image in zip(images, reference, strict=True)]
    return torch.tensor(found) > IDENTITY


@dataclass(frozen=True)
class ImageSimilarity:
    """How similar images are to their references.

    Attributes:
        psnr: dB, from the mean squared error over all images.
        ssim: mean over the images.
        isolated: the number of isolated wrong pixels in all images, see `isolated_pixels`.
        identity: the share of the images that keep their identity, see `keeps_identity`.
        perceptual: distance of EfficientNet-Lite0 features, mean over the images; None: it was not measured.
    """

    psnr: float
    ssim: float
    isolated: int
    identity: float
    perceptual: float | None


def image_similarity(pairs: Iterable[tuple[Tensor, Tensor]], lite0: EfficientNetLite0 | None = None) -> ImageSimilarity:
    """Compare images with their references, holding one batch in memory at a time.

    Args:
        pairs: batches of (images, reference), uint8 [N, 3, H, W] each.
        lite0: `qdiff.evaluation.lite0.load_lite0()`, on the device where it is to run; None: leave out the perceptual
            distance.

    Returns:
        The measures over all batches.

    Raises:
        MissingExtra: torchmetrics is not installed.
    """
    count = isolated = kept = 0
    squared_error = similarity = distance = 0.0
    for images, reference in pairs:
        count += len(images)
        squared_error += 10 ** (-psnr(images, reference) / 10) * len(images)
        similarity += ssim(images, reference) * len(images)
        isolated += int(isolated_pixels(images, reference).sum())
        kept += int(keeps_identity(images, reference).sum())
        if lite0 is not None:
            device = next(lite0.parameters()).device
            distance += perceptual_distance(lite0, images.to(device), reference.to(device)).sum().item()
    decibels = -10 * math.log10(squared_error / count) if squared_error else math.inf
    perceptual = None if lite0 is None else distance / count
    return ImageSimilarity(decibels, similarity / count, isolated, kept / count, perceptual)
