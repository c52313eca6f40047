"""What docs/architecture.md shows works as it stands there: a scale rule, a sampler and a family, each in one file."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import qdiff
from ddim.samplers import PIXEL_SAMPLERS
from qdiff.architecture import find_architecture, register_family
from qdiff.checkpoint import PackedFile
from qdiff.scale_rules import SCALE_RULES
from tests.support import commands, tiny
from tests.support.commands import REPOSITORY


def shown(name: str) -> str:
    """The code block of docs/architecture.md that begins with this file name."""
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n# {re.escape(name)}\n(.*?)```", text, re.DOTALL)
    return code


@pytest.fixture
def one_file(tmp_path, monkeypatch):
    """Write a code block to a file and import it; afterwards its module is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name: str):
        (tmp_path / name).write_text(shown(name), encoding="utf-8")
        names.append(name.removesuffix(".py"))
        return importlib.import_module(names[-1])

    yield write
    for name in names:
        sys.modules.pop(name, None)


def sampling_options(folder, timesteps, images):
    """Options that sample the small pixel model into `folder`."""
    files = ["--config", tiny.config_file(folder), "--ckpt", tiny.weights_file(folder)]
    return [*files, "--timesteps", timesteps, "--max_images", images, "--threads", 1, "-l", folder]


def test_a_scale_rule_is_one_file(one_file, tmp_path, monkeypatch):
    monkeypatch.setattr(SCALE_RULES, "_entries", dict(SCALE_RULES._entries))
    rule = one_file("percentile_rule.py").percentile
    values = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 50  # an outlier, which the rule leaves out
    scale, _ = rule(values, 8, False, False)
    assert scale.shape == (4, 1) and (scale < 10 / 255).all()
    command = sampling_options(tmp_path, timesteps=4, images=1)
    recipe = ["--ptq", "--weight_bit", 4, "--cali_st", 2, "--cali_n", 4, "--cali_iters", 2]
    result = commands.run("sample_diffusion_ddim.py", *command, *recipe, "--weight_scale_method", "percentile")
    commands.succeeded(result)
    (packed,) = tmp_path.rglob("ckpt.safetensors")
    assert PackedFile.open(packed).info.config.weight_scale_method == "percentile"
    assert not list(tmp_path.rglob("ckpt.pth"))  # the format would not show its width
    SCALE_RULES._entries.pop("percentile")
    assert isinstance(qdiff.load(packed), torch.nn.Module)  # its scales need no rule


def test_a_sampler_is_one_file(one_file, tmp_path, monkeypatch):
    monkeypatch.setattr(PIXEL_SAMPLERS, "_entries", dict(PIXEL_SAMPLERS._entries))
    one_file("euler_sampler.py")
    command = sampling_options(tmp_path, timesteps=5, images=2)
    commands.succeeded(commands.run("sample_diffusion_ddim.py", *command, "--sample_type", "euler"))
    assert len(list(tmp_path.rglob("img/*.png"))) == 2
    result = commands.run("sample_diffusion_ddim.py", *command, "--sample_type", "euler", "--eta", 0.5)
    commands.fails(result, "--eta 0.5")
    # Euler's method on the exact noise of a point mass at `target` ends at `target`, as DDIM does.
    sampler = PIXEL_SAMPLERS.get("euler")
    a = torch.linspace(0.9999, 0.01, 100, dtype=torch.float64)
    target = torch.full((1, 3, 2, 2), 0.3)

    def exact(x, t):
        at = a[int(t[0])].float()
        return (x - at.sqrt() * target) / (1 - at).sqrt()

    end = sampler.sample(exact, torch.randn(1, 3, 2, 2), a, torch.arange(0, 100, 10), lambda: target)
    assert torch.allclose(end, target, atol=1e-4)


def test_a_family_is_one_file(one_file, tmp_path, monkeypatch):
    monkeypatch.setattr("qdiff.architecture._FAMILIES", dict(importlib.import_module("qdiff.architecture")._FAMILIES))
    family = one_file("toy_family.py")
    register_family("toy", "toy_family:TOY")
    assert find_architecture("toy") is family.TOY
    x_t, t = torch.randn(16, 3, 8, 8), torch.arange(16.0)
    quantized = one_file("toy_checkpoint.py").write(tmp_path / "toy.safetensors", x_t, t)
    with torch.no_grad():
        expected = quantized(x_t, t)
        assert torch.equal(qdiff.load(tmp_path / "toy.safetensors", engine="simulated")(x_t, t), expected)


@pytest.mark.multiprocess
def test_a_family_of_an_installed_package_is_found_by_its_entry_point(one_file, tmp_path):
    """The entry point alone: a new process imports `qdiff` and loads a file of the family."""
    one_file("toy_family.py")
    metadata = tmp_path / "toy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[qdiff.families]\ntoy = toy_family:TOY\n")
    one_file("toy_checkpoint.py").write(tmp_path / "toy.safetensors", torch.randn(8, 3, 4, 4), torch.arange(8.0))
    code = f"import json, qdiff; print(json.dumps(type(qdiff.load({str(tmp_path / 'toy.safetensors')!r})).__name__))"
    path = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=True
    )
    assert json.loads(result.stdout) == "ToyUNet"
