"""The benchmarks on a foreign network and on other tools: what can be checked without their packages."""

import argparse
import importlib
from collections import Counter
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qdiff.config import PRESETS
from qdiff.errors import ConfigError
from tests.support.commands import REPOSITORY

LAYERS, ATTENTIONS, SHORTCUTS = 255, 28, 25  # of the network in the package's ONNX file


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


class Calls(TorchFunctionMode):
    """Counts the functions that a network calls."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_terrain_network_is_the_one_of_the_package(benchmark):
    network = benchmark("terrain_unet").UNetModel().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 10_456_545
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == LAYERS
    with Calls() as calls:
        output = network(torch.randn(1, 1, 32, 32), torch.tensor([1095.5]), torch.tensor([0.5]))
    assert output.shape == (1, 1, 32, 32)
    assert calls.counts[torch.einsum] == 2 * ATTENTIONS
    assert calls.counts[torch.cat] == SHORTCUTS + 1  # and the time embedding


def test_the_consistency_model_ends_at_its_input(benchmark):
    terrain = benchmark("terrain")
    noisy, sigma = torch.rand(2, 1, 4, 4), torch.full((2,), terrain.SIGMA_MIN)
    denoised = terrain.denoise(lambda x, t, y: torch.full_like(x, 1e3), noisy, sigma, torch.zeros(2))
    torch.testing.assert_close(denoised, noisy)
    assert terrain.strength_sigma(1.0) == pytest.approx(terrain.SIGMA_MAX)


def test_sources_touch_the_ground(benchmark):
    terrain = benchmark("terrain")
    values = torch.rand(3, 1, 8, 8) * 2 - 1
    source = terrain.source(values)
    assert (source.amin(dim=(-2, -1)) + 1).abs().max() < 1e-5
    torch.testing.assert_close(terrain.source(source), source)


def test_settings_of_the_terrain_benchmark(benchmark):
    parse = benchmark("terrain").parse_setting
    assert parse("W4A32") == {"weight_bit": 4, "act_bit": None}
    expected = {"weight_bit": 8, "act_bit": 8, "preset": "fast", "iters": 40, "splits": {"a": 1, "b": 2}}
    assert parse("W8A8:fast:iters=40,splits={'a': 1, 'b': 2}") == expected
    with pytest.raises(argparse.ArgumentTypeError, match="expected WxAy"):
        parse("4/8")


def test_a_missing_package_is_named_with_its_command(benchmark, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"found none, expected .* pip install --no-deps adaptive-terrain-diffusion"):
        benchmark("terrain_unet").onnx_file()


def test_bytes_of_a_tensor_that_is_made_of_others(benchmark):
    tensor_bytes = benchmark("peer_tools").tensor_bytes

    class Packed:
        integers, scale = torch.zeros(6, dtype=torch.uint8), torch.zeros(2)

        def __tensor_flatten__(self):
            return ["integers", "scale"], None

    assert tensor_bytes(nn.Parameter(torch.zeros(3))) == 12
    assert tensor_bytes(Packed()) == 6 + 8


def test_peers_are_skipped_where_they_are_not_installed(benchmark):
    is_installed = benchmark("peer_tools").is_installed
    assert is_installed("torch") and not is_installed("not_there") and not is_installed("not_there.nor_here")


def test_levers_change_settings_of_fast(benchmark):
    levers = benchmark("levers")
    changed = {name: replace(PRESETS["fast"], **settings).validate() for name, settings in levers.LEVERS.items()}
    same = {name for name, recipe in changed.items() if recipe == PRESETS["fast"]}
    assert same == {"fast", levers.GROUPS, levers.NEAREST}


def test_noise_has_the_size_that_is_asked_for(benchmark):
    noisy = benchmark("isolated_pixels").WithNoise(nn.Identity(), 0.01)
    scales = torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * scales
    relative = (noisy(x) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    torch.testing.assert_close(relative, torch.full((3,), 0.01), rtol=0.02, atol=0)


def test_isolated_pixels_of_images_that_keep_their_identity_are_counted_apart(benchmark):
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    reference = images.clone()
    images[1, :, 5, 5] = 255  # one pixel of 256: 24 dB
    reference[2], images[2, 0, 3::4, 3::4] = 200, 255  # another image
    row = benchmark("isolated_pixels").row("name", images, reference)
    assert row == ["name", "17", "1", "2", "16 (image 2)", "67%"]
