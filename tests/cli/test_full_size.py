"""A synthetic published checkpoint of the CIFAR-10 network: loading time, memory, size of the packed form."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddim.config import load_config
from ddim.family import PIXEL, unet_config_dict
from ddim.unet import UNet
from qdiff.checkpoint import PackedInfo, load_packed, load_published, save_packed, save_published
from qdiff.config import QuantConfig
from qdiff.model import act_quantizers, init_weights, quantize_model

CONFIG = load_config("configs/cifar10.yml")
QUANT = QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    unet = UNet(CONFIG.model).requires_grad_(False)
    model = quantize_model(unet, PIXEL, QUANT)
    init_weights(model, "max")
    for quantizer in act_quantizers(model).values():
        quantizer.set_qparams(torch.rand(()) * 0.05 + 0.01, torch.tensor(0.0))
    path = tmp_path_factory.mktemp("full") / "ckpt.pth"
    save_published(path, model, PIXEL, unet.state_dict(), activations=True)
    return path


@pytest.mark.multiprocess
def test_loads_fast_and_lean(published):
    code = f"""
import time
import torch
torch.set_num_threads(1)
from ddim.config import load_config
from ddim.family import PIXEL, unet_config_dict
from qdiff.checkpoint import load_published
from qdiff.utils.memory import peak_memory
from qdiff.config import QuantConfig
build = unet_config_dict(load_config("configs/cifar10.yml").model)
before, start = peak_memory(), time.process_time()
load_published({str(published)!r}, build, PIXEL, QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True))
print(time.process_time() - start, (peak_memory() - before) / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < 10
    assert megabytes < published.stat().st_size / 2**20 + 2048


@torch.no_grad()
def test_packed_is_small_and_loads_alone(published, tmp_path):
    model = load_published(published, unet_config_dict(CONFIG.model), PIXEL, QUANT)
    path = tmp_path / "ckpt.safetensors"
    save_packed(path, model, PackedInfo("pixel", unet_config_dict(CONFIG.model), QUANT, {}, ""))
    assert path.stat().st_size <= 18.6e6
    alone, _ = load_packed(path)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500.0])
    assert torch.equal(alone(x, t), model(x, t))
    assert torch.isfinite(alone(x, t)).all()
