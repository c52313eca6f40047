"""Synthetic full-size checkpoints of Stable Diffusion and LSUN through the scripts: `make test-slow`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import expected_shapes
from ldm.config import load_config
from ldm.family import LATENT
from ldm.unet import UNetModel
from qdiff.checkpoint import published_shapes
from qdiff.config import QuantConfig
from qdiff.model import quantize_model
from tests.support import tiny_latent
from tests.support.commands import REPOSITORY

GIB = 2**30
pytestmark = pytest.mark.slow


def random_checkpoint(path: Path, config_file: Path) -> None:
    """Random float32 weights under every released name, and a pickled callback."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_shapes(load_config(config_file)).items():
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[1])[None]
        elif len(shape) < 2:
            tensors[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator).mul_((shape.numel() / shape[0]) ** -0.5)
    if "scale_factor" in tensors:
        tensors["scale_factor"] = torch.tensor(0.2)
    tiny_latent.save_as_lightning(path, tensors)


def random_calibrated(path: Path, config_file: Path, bits: int, split: bool, sm_abit: int, a_sym: bool) -> None:
    """A published calibrated checkpoint: weights, alphas and step sizes that fit one another, random."""
    config = load_config(config_file)
    with torch.device("meta"):
        model = quantize_model(
            UNetModel(config.unet), LATENT, QuantConfig(bits, quant_act=True, split=split, sm_abit=sm_abit)
        )
    generator = torch.Generator().manual_seed(1)
    state = {}
    levels = 2**bits - 1
    for name, shape in published_shapes(model, LATENT).items():
        if name.endswith("weight_quantizer.alpha") or name.endswith("weight_quantizer_0.alpha"):
            state[name] = torch.randn(shape, generator=generator)
        elif "weight_quantizer" in name:
            state[name] = torch.full(shape, (levels + 1) // 2.0) if name.endswith("zero_point") else None
        elif "act_quantizer" in name:
            softmax = "act_quantizer_w." in name
            step = (1 / (2**sm_abit - 1) if softmax else 0.05) if name.endswith("delta") else 0.0
            state[name] = torch.tensor(step if name.endswith("delta") or softmax or a_sym else 128.0)
        elif len(shape) < 2:
            state[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        else:
            state[name] = torch.randn(shape, generator=generator).mul_((shape.numel() / shape[0]) ** -0.5)
    for name in [name for name, value in state.items() if value is None]:
        layer, _, quantizer = name.removesuffix(".delta").rpartition(".")
        weight = state[f"{layer}.weight"]
        if split and f"{layer}.weight_quantizer_0.alpha" in state:
            boundary = state[f"{layer}.weight_quantizer.alpha"].shape[1]
            weight = weight[:, :boundary] if quantizer == "weight_quantizer" else weight[:, boundary:]
        flat = weight.flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        state[name] = ((high - low) / levels).reshape(-1, *[1] * (weight.dim() - 1))
        state[name.replace("delta", "zero_point")] = (-low / ((high - low) / levels)).round().reshape(state[name].shape)
    torch.save(state, path)


def peak_anonymous(command: list[str], log: Path) -> int:
    """Run a command and return the highest RssAnon of the process, in bytes, sampled every 50 ms."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)
        peak = 0
        while True:
            try:
                process.wait(0.05)
                break
            except subprocess.TimeoutExpired:
                found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                peak = max(peak, int(found[1]) * 1024 if found else 0)
    assert process.returncode == 0, log.read_text()[-2000:]
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_stable_diffusion_at_w4a8_with_16_bit_softmax(tmp_path):
    config = REPOSITORY / "configs/stable-diffusion/v1-inference.yaml"
    random_checkpoint(tmp_path / "sd-v1-4.ckpt", config)
    random_calibrated(tmp_path / "ckpt.pth", config, 4, split=True, sm_abit=16, a_sym=False)
    words = (
        f"--ckpt {tmp_path}/sd-v1-4.ckpt --prompt puppy --plms --cond --ptq --weight_bit 4 --quant_mode qdiff "
        f"--no_grad_ckpt --split "
        f"--quant_act --act_bit 8 --sm_abit 16 --n_samples 1 --n_iter 1 --ddim_steps 1 --precision full "
        f"--threads {os.cpu_count()} "
        f"--outdir {tmp_path}/out --cali_ckpt {tmp_path}/ckpt.pth"
    )
    command = [sys.executable, "scripts/txt2img.py", *words.split()]
    peak = peak_anonymous(command, tmp_path / "log")
    print(f"peak anonymous memory {peak / GIB:.2f} GiB")
    assert peak < 9e9
    assert len(list((tmp_path / "out").glob("*/samples/*.png"))) == 1


@pytest.mark.parametrize(
    ("name", "options"), [("lsun_beds256", "-c 2 -e 1.0 --a_sym"), ("lsun_churches256", "-c 2 -e 0.0")]
)
def test_lsun_through_the_published_command(tmp_path, name, options):
    folder = tmp_path / name
    folder.mkdir()
    config = REPOSITORY / f"models/ldm/{name}/config.yaml"
    (folder / "config.yaml").write_bytes(config.read_bytes())
    random_checkpoint(folder / "model.ckpt", config)
    random_calibrated(tmp_path / "ckpt.pth", config, 4, split=False, sm_abit=8, a_sym="--a_sym" in options)
    words = (
        f"-r {folder}/model.ckpt -n 2 --batch_size 2 --seed 41 --ptq --weight_bit 4 --quant_act --act_bit 8 {options} "
    )
    words += f"-l {tmp_path} --cali_ckpt {tmp_path}/ckpt.pth"
    command = [sys.executable, "scripts/sample_diffusion_ldm.py", *words.split()]
    peak_anonymous(command, tmp_path / "log")
    assert len(list(tmp_path.glob(f"{name}/samples/*/img/*.png"))) == 2
