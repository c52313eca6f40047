"""What a forward pass launches and moves on a card, counted on the meta device, against float16 eager."""

import importlib

import pytest

from ddim.config import load_config
from ddim.unet import ResnetBlock, UNet
from tests.support import tiny
from tests.support.commands import REPOSITORY

pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("gpu_traffic")


# launches and GB of float16 eager, counted for the released structures
BUDGETS = {
    "configs/cifar10.yml": (64, 365, 5.5),
    "models/ldm/lsun_beds256/config.yaml": (8, 457, 6.0),
    "configs/stable-diffusion/v1-inference.yaml": (2, 850, 7.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", BUDGETS)
def test_full_size_networks_launch_and_move_no_more_than_float16(counting, config):
    batch, launches, gigabytes = BUDGETS[config]
    total = counting.integer(REPOSITORY / config, batch).total()
    assert total.launches <= launches and total.distinct <= gigabytes * 1e9


def test_budget_of_a_tiny_network(counting, tmp_path):
    """Its 16 channels are stored as 32, so it moves a little more than float16: 148 launches and 25.8 MB."""
    total = counting.integer(tiny.config_file(tmp_path), 64).total()
    assert total.launches <= 162 and total.distinct <= 26.9e6


def test_every_pass_over_the_attention_matrix_is_gone(counting, tmp_path):
    path = tiny.config_file(tmp_path)
    names = {one.name for one in counting.integer(path, 2).counted}
    assert {"int8_attention", "int8_product", "int8_quantize", "group_norm_map"} <= names
    assert not names & {"bmm", "_softmax", "convolution", "addmm", "mm", "native_group_norm"}


def test_both_bytes_of_wide_activations_are_counted(counting):
    config = REPOSITORY / "configs/emoji32.yml"
    few, wide = (counting.integer(config, 2, policy=policy) for policy in ((), (("*.temb_proj", "A16"),)))
    products = [sum(one.name == "int8_product" for one in counter.counted) for counter in (few, wide)]
    blocks = sum(isinstance(module, ResnetBlock) for module in UNet(load_config(config).model).modules())
    assert products[1] == products[0] + blocks
