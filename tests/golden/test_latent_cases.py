"""The latent networks, autoencoders and samplers against the reference data."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import ldm.unet
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.checkpoint import expected_shapes
from ldm.config import load_config
from ldm.family import LATENT, unet_config_dict
from ldm.samplers import LATENT_SAMPLERS, Guided, LatentSamplerConfig, ddim_sigmas, latent_timesteps
from ldm.unet import UNetModel, unet_config
from qdiff.checkpoint import load_into, load_published, published_shapes, read_tensors
from qdiff.config import QuantConfig
from qdiff.model import enable_activations, init_weights, quantize_model
from tests.support import commands, golden

REPOSITORY = commands.REPOSITORY
golden.require()
CASES = [name for family in ("latent", "stable-diffusion") for name in golden.cases(family)]
CONFIGS = {
    "lsun_beds256": "models/ldm/lsun_beds256/config.yaml",
    "lsun_churches256": "models/ldm/lsun_churches256/config.yaml",
    "celeba256": "models/ldm/celeba256/config.yaml",
    "ffhq256": "models/ldm/ffhq256/config.yaml",
    "cin256_v2": "models/ldm/cin256-v2/config.yaml",
    "stable_diffusion_v1": "configs/stable-diffusion/v1-inference.yaml",
}


class Case:
    def __init__(self, name: str) -> None:
        self.folder = golden.path(f"cases/{name}")
        settings = json.loads((self.folder / "case.json").read_text())
        self.config = unet_config(settings["unet"])
        names = ("weight_bit", "act_bit", "sm_abit", "split", "a_sym", "weight_scale_method", "act_scale_method")
        self.quant = QuantConfig(quant_act=True, **{name: settings[name] for name in names})
        self.io = load_file(self.folder / "io.safetensors")
        self.rows = settings["outputs_are_for_first"]

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [self.io["x"].to(dtype), self.io["t"]] + (
            [self.io["context"].to(dtype)] if "context" in self.io else []
        )
        return [tensor[: self.rows] for tensor in given]

    def unet(self) -> UNetModel:
        return load_into(
            UNetModel(self.config), read_tensors(self.folder / "unet_fp32.safetensors"), self.folder
        ).eval()

    def quantized(self) -> torch.nn.Module:
        return load_published(self.folder / "ckpt.pth", unet_config_dict(self.config), LATENT, self.quant)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def agrees_in_double(
    network: torch.nn.Module, case: Case, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Within 1e-9, allowing the frequencies of the time embedding their last bit.

    float32 exp differs by one unit in the last place between processors, so the frequencies are the
    only numbers here that are not fixed by the reference; a frequency may take the neighboring float.
    """
    inputs = case.inputs(torch.float64)

    def error() -> float:
        return golden.relative_error(network(*inputs), expected)

    best = error()
    half = case.config.model_channels // 2
    table = ldm.unet.frequencies(half)
    monkeypatch.setattr(ldm.unet, "frequencies", lambda _: table)
    for i in range(half):
        if best < 1e-9:
            return True
        for direction in (0.0, 2.0):
            kept = table[i].clone()
            table[i] = torch.nextafter(kept, torch.tensor(direction))
            found = error()
            if found < best:
                best = found
            else:
                table[i] = kept
    return best < 1e-9


@torch.no_grad()
def test_full_precision_outputs(case, monkeypatch):
    unet = case.unet()
    assert golden.relative_error(unet(*case.inputs(torch.float32)), case.io["y_fp"]) < 1e-5
    assert agrees_in_double(unet.double(), case, case.io["y_fp64"], monkeypatch)


@torch.no_grad()
def test_nearest_rounding(case):
    model = quantize_model(case.unet(), LATENT, case.quant)
    init_weights(model, case.quant.weight_scale_method)
    assert golden.relative_error(model(*case.inputs(torch.float32)), case.io["y_w_nearest"]) < 1e-5


@torch.no_grad()
def test_published_checkpoint(case, monkeypatch):
    model = case.quantized()
    enable_activations(model, False)
    assert golden.relative_error(model(*case.inputs(torch.float32)), case.io["y_w"]) < 1e-5
    model.double()
    enable_activations(model, True)
    assert golden.relative_error(model(*case.inputs(torch.float64)), case.io["y_wa64"]) < 1e-6
    enable_activations(model, False)
    assert agrees_in_double(model, case, case.io["y_w64"], monkeypatch)


@torch.no_grad()
def test_slices_of_the_attention_change_nothing(case, monkeypatch):
    model = case.quantized().double()
    whole = model(*case.inputs(torch.float64))
    monkeypatch.setattr("ldm.attention.SLICE_BYTES", 1)
    assert golden.relative_error(model(*case.inputs(torch.float64)), whole) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), [("autoencoder_kl", AutoencoderKL), ("autoencoder_vq", VQModel)])
def test_autoencoders(name, kind):
    folder = golden.path(f"autoencoders/{name}")
    model = kind(**json.loads((folder / "case.json").read_text())).double()
    model.load_state_dict({key: tensor.double() for key, tensor in load_file(folder / "weights.safetensors").items()})
    io = {key: tensor.double() for key, tensor in load_file(folder / "io.safetensors").items()}
    assert golden.relative_error(model.decode(io["z"]), io["decoded"]) < 1e-9
    if kind is AutoencoderKL:
        mean, std = model.posterior(io["image"])
        assert (
            golden.relative_error(mean, io["encoded_mean"]) < 1e-9
            and golden.relative_error(std, io["encoded_std"]) < 1e-9
        )
    else:
        assert golden.relative_error(model.encode(io["image"]), io["encoded"]) < 1e-9


def alphas(start: float, end: float) -> torch.Tensor:
    return torch.cumprod(1 - torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2, 0)


@torch.no_grad()
def test_golden_samples():
    data = golden.tensors("samplers/samplers.safetensors")
    which = golden.read_json("samplers/cases.json")
    plain, text = Case(which["ldm"]).unet(), Case(which["sd"]).unet()
    schedules = {"ldm": alphas(0.0015, 0.0195), "sd": alphas(0.00085, 0.012)}
    seen = 0
    for name, expected in data.items():
        if not (match := re.fullmatch(r"(ldm|sd)\.(ddim|plms|dpm)_(\d+)(?:_eta(\d))?(?:_cfg([\d.]+))?", name)):
            continue
        family, sampler, steps, eta, scale = match.groups()
        a, x, noise = schedules[family], data[f"{family}.x_T"], iter(data.get(f"ldm.noise_{steps}_eta{eta}", []))
        network = Guided(text, data["sd.c"], data["sd.uc"], float(scale)) if family == "sd" else plain
        settings = LatentSamplerConfig(sampler, int(steps), float(eta or 0))
        timesteps = LATENT_SAMPLERS.get(sampler).timesteps(settings, len(a))
        found = LATENT_SAMPLERS.get(sampler).sample(network, x, a, timesteps, noise.__next__, eta=settings.eta)
        assert golden.relative_error(found, expected) < 5e-6, name
        seen += 1
    assert seen >= 5
    assert latent_timesteps(10).tolist() == data["ldm.ddim_timesteps_10"].tolist()
    a, a_prev = data["ldm.ddim_alphas_10"], data["ldm.ddim_alphas_prev_10"]
    assert golden.relative_error(ddim_sigmas(a, a_prev, 1.0), data["ldm.ddim_sigmas_10_eta1"]) < 1e-6


def shapes_of(manifest: dict) -> dict[str, list[int]]:
    return {name: shape for name, (shape, _) in manifest.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_manifests(name):
    config = load_config(REPOSITORY / CONFIGS[name])
    found = {key: list(shape) for key, shape in expected_shapes(config).items()}
    assert found == shapes_of(golden.read_json(f"manifests/{name}.json"))
    for split in (False, True):
        manifest = golden.ROOT / f"manifests/{name}_quantized{'_split' if split else ''}.json"
        if not manifest.exists():
            continue
        with torch.device("meta"):
            model = quantize_model(UNetModel(config.unet), LATENT, QuantConfig(quant_act=True, split=split))
        found = {key: list(shape) for key, shape in published_shapes(model, LATENT).items()}
        assert found == shapes_of(json.loads(manifest.read_text()))


def test_configs_have_the_published_values():
    names = {f"{name}.yaml": CONFIGS[name] for name in ("lsun_beds256", "lsun_churches256", "celeba256", "ffhq256")}
    names |= {
        "latent-diffusion_cin256-v2.yaml": "configs/latent-diffusion/cin256-v2.yaml",
        "latent-diffusion_txt2img-1p4B-eval.yaml": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
        "stable-diffusion_v1-inference.yaml": "configs/stable-diffusion/v1-inference.yaml",
    }
    for theirs, ours in names.items():
        published, own = load_config(golden.path(f"configs/{theirs}")), load_config(REPOSITORY / ours)
        for field in (
            "unet",
            "linear_start",
            "linear_end",
            "timesteps",
            "image_size",
            "channels",
            "scale_factor",
            "use_ema",
        ):
            assert getattr(published, field) == getattr(own, field), (ours, field)
        for params in (published.first_stage.params, own.first_stage.params):
            params.pop("lossconfig", None)
            params.pop("monitor", None)
        assert published.first_stage.params == own.first_stage.params and published.conditioning == own.conditioning
