"""Try an installed wheel from a folder that is not a clone.

Every module is imported, a tiny network is quantized, saved and loaded, two steps are sampled, and commands are run.
"""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

import ddim
import ldm
import qdiff
import qdiff_cli
from ddim.config import load_config
from ddim.sampling import PixelSampler, PixelSamplerConfig
from ddim.unet import UNet
from ldm.config import load_config as load_latent_config
from qdiff.errors import MissingExtra

NEED_EXTRAS = {"qdiff.diffusers": "diffusers"}  # modules that cannot be imported without an extra
# modules that need Triton, which comes with PyTorch for CUDA
NEED_TRITON = {
    f"qdiff.engines.gpu.{name}" for name in ("activations", "graphs", "kernels", "launches", "layers", "traffic")
}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        return self.last(torch.relu(self.first(x) + torch.cos(t)[:, None, None, None]))


def import_everything() -> int:
    names = [
        m.name
        for package in (qdiff, qdiff_cli, ddim, ldm)
        for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    ]
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if name not in NEED_TRITON]
    for name in names:
        if name in NEED_EXTRAS:
            expect_missing(partial(importlib.import_module, name), NEED_EXTRAS[name])
        else:
            importlib.import_module(name)
    return len(names)


def expect_missing(call, extra: str) -> None:
    try:
        call()
    except MissingExtra as error:
        assert f"qdiff[{extra}]" in str(error), error
    else:
        raise AssertionError(f"expected an ImportError that names the extra {extra}")


def main() -> None:
    assert not (Path(qdiff.__file__).parents[1] / "pyproject.toml").exists(), (
        "this is the clone, not the installed wheel"
    )
    print(f"{import_everything()} modules imported")

    from qdiff.engines.onnx import export_onnx
    from qdiff.evaluation.lite0 import load_lite0

    expect_missing(load_lite0, "eval")
    expect_missing(lambda: export_onnx("model.onnx", nn.Identity(), []), "export")

    x, t = torch.randn(16, 3, 8, 8), torch.arange(16.0)
    network = qdiff.quantize(Denoiser(), (x, t), weight_bit=4, iters=5, iters_a=5, iters_tune=2, batch_size=8)
    assert torch.isfinite(network(x, t)).all()
    qdiff.save("tiny.safetensors", network)
    assert torch.equal(qdiff.load("tiny.safetensors", model=Denoiser(), device="cpu")(x, t), network(x, t))
    print("a tiny network is quantized, saved and loaded")

    config = load_config("configs/cifar10.yml")
    load_latent_config("configs/stable-diffusion/v1-inference.yaml")
    load_latent_config("models/ldm/lsun_beds256/config.yaml")
    sampler = PixelSampler(config, PixelSamplerConfig(timesteps=2), torch.device("cpu"))
    with torch.no_grad():
        images = sampler(UNet(config.model).eval(), range(1), seed=0)
    assert images.shape == (1, 3, 32, 32) and torch.isfinite(images).all()
    print("two steps of a CIFAR-10 UNet with random weights are sampled")

    command = Path(sys.executable).with_name("qdiff")
    for words, expected in (
        (["txt2img", "--prompt", "a puppy"], "models/ldm/stable-diffusion-v1/model.ckpt: no such file"),
        (["sample-ddim", "--config", "emoji32.yml", "--use_pretrained"], "part of a clone of the repository"),
    ):
        result = subprocess.run([command, *words], capture_output=True, text=True)
        lines = result.stderr.splitlines()
        assert result.returncode == 1 and len(lines) == 1 and expected in lines[0], result.stderr
        print(f"qdiff {words[0]}: {lines[0]}")


if __name__ == "__main__":
    main()
