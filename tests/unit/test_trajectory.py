"""Trajectory errors and image similarity against their definitions."""

import math

import pytest
import torch

from qdiff.evaluation.similarity import IDENTITY, ISOLATED, isolated_pixels, keeps_identity, psnr, ssim
from qdiff.evaluation.trajectory import trajectory_errors
from tests.support import pictures, tiny


def test_psnr_and_ssim():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(20, 230, (2, 3, 32, 32), generator=generator).to(torch.uint8)
    assert psnr(image, image) == math.inf
    assert psnr(image + 10, image) == pytest.approx(20 * math.log10(255 / 10))
    assert ssim(image, image) == pytest.approx(1.0, abs=1e-5)
    noisy = (image.int() + torch.randint(-20, 20, image.shape, generator=generator)).to(torch.uint8)
    assert ssim(noisy, image) < 0.999


def gray(count: int = 1, value: int = 100) -> torch.Tensor:
    return torch.full((count, 3, 16, 16), value, dtype=torch.uint8)


def with_dots(images: torch.Tensor, *places: tuple[int, int], value: int = 200, channel: int = 1) -> torch.Tensor:
    images = images.clone()
    for y, x in places:
        images[:, channel, y, x] = value
    return images


@pytest.mark.parametrize("place", [(8, 8), (0, 0), (0, 7), (15, 15), (1, 15), (14, 1)])
def test_a_dot_of_one_channel_is_isolated_everywhere(place):
    assert isolated_pixels(with_dots(gray(), place), gray()).tolist() == [1]


def test_a_dot_counts_from_the_threshold_on():
    for difference, count in ((ISOLATED, 0), (ISOLATED + 1, 1)):
        for value in (100 + difference, 100 - difference):
            assert isolated_pixels(with_dots(gray(), (4, 4), value=value), gray()).tolist() == [count]


def test_isolated_pixels_are_counted_once_and_image_by_image():
    images = torch.cat([gray(), with_dots(gray(), (4, 4), (9, 2)), with_dots(gray(value=0), (3, 3), value=255)])
    images = with_dots(images, (9, 2), channel=0)  # a second channel of the same pixel
    references = torch.cat([gray(2), gray(value=0)])
    references[:, 0, 9, 2] = images[:, 0, 9, 2]  # of full precision too
    assert isolated_pixels(images, references).tolist() == [0, 1, 1]


def test_edges_and_smooth_shades_are_not_isolated():
    images = gray(4)
    images[0, :, :, 8:] = 255  # an edge
    images[1, :, 4:8, 4:8] = 0  # a block: only at its corners do most neighbors differ
    images[2] = torch.arange(0, 256, 16, dtype=torch.uint8)  # a shade
    images[3] += 100  # all of it is wrong, but none of it is isolated
    assert isolated_pixels(images, gray(4)).tolist() == [0, 4, 0, 0]


def test_what_full_precision_has_within_one_pixel_is_not_wrong():
    reference = with_dots(gray(), (8, 8))
    for place, count in (((8, 8), 0), ((7, 9), 0), ((8, 10), 1), ((6, 8), 1)):
        assert isolated_pixels(with_dots(gray(), place, channel=2), reference).tolist() == [count]


def test_isolated_pixels_follow_their_definition_on_any_image():
    """Against the definition, pixel by pixel, on noise, where half of the pixels are isolated."""
    generator = torch.Generator().manual_seed(0)
    image, reference = torch.randint(0, 256, (2, 1, 3, 9, 7), generator=generator).to(torch.uint8)
    reference[..., 3:] = 90  # and a half without isolated pixels

    def isolated(picture: torch.Tensor, y: int, x: int) -> bool:
        rows, columns = ([abs(i - 1), i, size - 1 - abs(size - 2 - i)] for i, size in ((y, 9), (x, 7)))
        around = picture[0][:, rows][:, :, columns].flatten(1).int()
        return bool(((picture[0, :, y, x].int() - around.sort().values[:, 4]).abs() > ISOLATED).any())

    places = [(y, x) for y in range(9) for x in range(7)]
    allowed = [place for place in places if isolated(reference, *place)]
    wrong = [
        (y, x)
        for y, x in places
        if isolated(image, y, x) and not any(abs(y - i) <= 1 and abs(x - j) <= 1 for i, j in allowed)
    ]
    assert isolated_pixels(image, reference).tolist() == [len(wrong)] and 0 < len(wrong) < len(places) / 2


def test_an_image_keeps_its_identity_over_twenty_decibels():
    """A difference of d everywhere has 20 log10(255 / d) dB: 25.5 is the limit."""
    images = torch.cat([gray(), gray() + 25, gray() + 26, 255 - gray()])
    assert keeps_identity(images, gray(4)).tolist() == [True, True, False, False]
    assert psnr(gray() + 26, gray()) < IDENTITY < psnr(gray() + 25, gray())
    assert keeps_identity(pictures.make(3, 0), pictures.make(3, 1)).tolist() == [False] * 3


def test_trajectory_error_of_a_scaled_network_is_its_scale():
    network = tiny.unet()

    class Scaled(torch.nn.Module):
        def forward(self, x, t):
            return 1.1 * network(x, t)

    run = lambda callback: tiny.sampler(5)(network, range(4), 0, callback)  # noqa: E731
    errors = trajectory_errors(run, {"scaled": Scaled(), "same": network})
    assert errors["scaled"].per_step == pytest.approx([0.1] * 5, rel=1e-4) and errors["same"].mean == 0
