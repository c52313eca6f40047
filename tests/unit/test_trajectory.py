"""Trajectory errors and image similarity against their definitions."""

import math
import subprocess
import sys

import pytest
import torch

from qdiff.evaluation.similarity import psnr, ssim
from qdiff.evaluation.trajectory import trajectory_errors
from tests.support import commands, tiny


def test_psnr_and_ssim():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(20, 230, (2, 3, 32, 32), generator=generator).to(torch.uint8)
    assert psnr(image, image) == math.inf
    assert psnr(image + 10, image) == pytest.approx(20 * math.log10(255 / 10))
    assert ssim(image, image) == pytest.approx(1.0, abs=1e-5)
    noisy = (image.int() + torch.randint(-20, 20, image.shape, generator=generator)).to(torch.uint8)
    assert ssim(noisy, image) < 0.999


def test_trajectory_error_of_a_scaled_network_is_its_scale():
    network = tiny.unet()

    class Scaled(torch.nn.Module):
        def forward(self, x, t):
            return 1.1 * network(x, t)

    run = lambda callback: tiny.sampler(5)(network, range(4), 0, callback)  # noqa: E731
    errors = trajectory_errors(run, {"scaled": Scaled(), "same": network})
    assert errors["scaled"].per_step == pytest.approx([0.1] * 5, rel=1e-4) and errors["same"].mean == 0


@pytest.mark.multiprocess
def test_torchvision_becomes_importable_beside_any_torch():
    code = """
from qdiff.utils.compat import make_torchvision_importable
make_torchvision_importable()
import torchvision.transforms, torchmetrics
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=commands.REPOSITORY)
