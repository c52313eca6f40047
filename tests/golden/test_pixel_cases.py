"""The pixel network against the reference data: names, shapes, outputs, quantized outputs."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from ddim.config import DiffusionConfig, load_config, model_config_from_dict
from ddim.family import PIXEL, unet_config_dict
from ddim.samplers import ddim_timesteps, dpm_solver_timesteps, sample_ddim, sample_dpm_solver
from ddim.schedule import make_alphas_cumprod
from ddim.unet import UNet
from qdiff.checkpoint import load_into, load_published, published_shapes, read_tensors
from qdiff.config import QuantConfig
from qdiff.model import enable_activations, init_weights, quantize_model
from tests.support import commands, golden

golden.require()
CASES = golden.cases("pixel")
ALPHAS = make_alphas_cumprod(DiffusionConfig())
REPOSITORY = commands.REPOSITORY


class Case:
    def __init__(self, name: str) -> None:
        folder = golden.path(f"cases/{name}")
        settings = json.loads((folder / "case.json").read_text())
        self.folder = folder
        values = settings["unet"]["data"] | settings["unet"]["model"]
        self.model_config = model_config_from_dict(values, ignored=values)
        names = ("weight_bit", "act_bit", "sm_abit", "split", "a_sym", "weight_scale_method", "act_scale_method")
        self.quant = QuantConfig(quant_act=True, **{name: settings[name] for name in names})
        self.io = load_file(folder / "io.safetensors")
        rows = settings["outputs_are_for_first"]
        self.x, self.t = self.io["x"][:rows], self.io["t"][:rows]

    def unet(self) -> UNet:
        return load_into(
            UNet(self.model_config), read_tensors(self.folder / "unet_fp32.safetensors"), self.folder
        ).eval()

    def quantized(self) -> torch.nn.Module:
        return load_published(self.folder / "ckpt.pth", unet_config_dict(self.model_config), PIXEL, self.quant)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


@torch.no_grad()
def test_full_precision_outputs(case):
    unet = case.unet()
    assert golden.relative_error(unet(case.x, case.t), case.io["y_fp"]) < 1e-5
    assert golden.relative_error(unet.double()(case.x.double(), case.t), case.io["y_fp64"]) < 1e-9


@torch.no_grad()
def test_nearest_rounding(case):
    model = quantize_model(case.unet(), PIXEL, case.quant)
    init_weights(model, case.quant.weight_scale_method)
    assert golden.relative_error(model(case.x, case.t), case.io["y_w_nearest"]) < 1e-5


@torch.no_grad()
def test_published_checkpoint_weights_only(case):
    model = case.quantized()
    enable_activations(model, False)
    assert golden.relative_error(model(case.x, case.t), case.io["y_w"]) < 1e-5
    assert golden.relative_error(model.double()(case.x.double(), case.t), case.io["y_w64"]) < 1e-9


@torch.no_grad()
def test_published_checkpoint_with_activations(case):
    model = case.quantized().double()
    assert golden.relative_error(model(case.x.double(), case.t), case.io["y_wa64"]) < 1e-6


def _shapes(manifest: dict) -> dict[str, list[int]]:
    return {name: shape for name, (shape, _) in manifest.items()}


def test_cifar10_manifests():
    config = load_config(REPOSITORY / "configs/cifar10.yml").model
    with torch.device("meta"):
        unet = UNet(config)
    found = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert found == _shapes(golden.read_json("manifests/cifar10_unet.json"))
    model = quantize_model(unet, PIXEL, QuantConfig(quant_act=True, split=True, a_sym=True))
    found = {name: list(shape) for name, shape in published_shapes(model, PIXEL).items()}
    assert found == _shapes(golden.read_json("manifests/cifar10_quantized_split.json"))


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


@torch.no_grad()
def test_golden_samples():
    data = golden.tensors("samplers/samplers.safetensors")
    unet = Case(golden.read_json("samplers/cases.json")["ddim"]).unet()
    x = data["ddim.x_T"]
    seen = 0
    for name, expected in data.items():
        if match := re.fullmatch(r"ddim\.(uniform|quad)_(\d+)_eta0", name):
            found = sample_ddim(unet, x, ALPHAS, ddim_timesteps(match[1], int(match[2])), no_noise)
        elif match := re.fullmatch(r"ddim\.dpmsolverpp_order3_singlestep_(\d+)", name):
            found = sample_dpm_solver(unet, x, ALPHAS, dpm_solver_timesteps(int(match[1])), no_noise)
        elif match := re.fullmatch(r"ddim\.seq_(quad|uniform)_(\d+)", name):
            assert ddim_timesteps(match[1], int(match[2])).tolist() == expected.tolist()
            continue
        else:
            continue
        seen += 1
        assert golden.relative_error(found, expected) < 5e-6, name
    assert seen >= 3
