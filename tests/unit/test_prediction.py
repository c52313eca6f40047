"""Networks that predict v or x0 sample what the same network sampled as eps. Values that are not finite stop a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddim.config import DiffusionConfig, PixelConfig
from ddim.sampling import PixelSampler, PixelSamplerConfig, make_calibration_set
from ldm.config import load_config
from ldm.sampling import LatentSampler, LatentSamplerConfig
from qdiff.config import CalibrationConfig
from qdiff.errors import ConfigError, NonFiniteError
from qdiff.prediction import Prediction
from tests.support import golden, tiny, tiny_latent

CPU, STEPS = torch.device("cpu"), 6


def eps_network(x, t, context=None):
    """Some smooth noise estimate."""
    shift = 0 if context is None else context.mean((1, 2)).to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(x * 0.7 + 0.1 * torch.sin(t.to(x.dtype) / 100).reshape(-1, 1, 1, 1) + shift)


def predicting(kind, alphas_cumprod):
    """The same estimate as the output of a network that predicts v or x0, by their definitions."""

    def network(x, t, context=None):
        eps = eps_network(x, t, context)
        low = t.double().floor().long().clamp(max=len(alphas_cumprod) - 1)
        high = (low + 1).clamp(max=len(alphas_cumprod) - 1)
        log_alpha = torch.lerp(alphas_cumprod.log()[low] / 2, alphas_cumprod.log()[high] / 2, t.double() - low)
        alpha = log_alpha.exp().reshape(-1, 1, 1, 1)
        sigma = (1 - alpha.square()).sqrt()
        x0 = (x.double() - sigma * eps) / alpha
        return x0 if kind == "x0" else alpha * eps - sigma * x0

    return network if kind != "eps" else eps_network


def pixel_sampler(kind, sample_type):
    config = PixelConfig(Path("tiny"), tiny.MODEL, DiffusionConfig(parameterization=kind), 16, None, {})
    return PixelSampler(config, PixelSamplerConfig(sample_type, "uniform", STEPS), CPU)


@pytest.mark.parametrize("kind", ["v", "x0"])
@pytest.mark.parametrize("sample_type", ["generalized", "dpm_solver", "ddpm_noisy"])
def test_pixel_samplers(kind, sample_type):
    samples = {}
    for one in ("eps", kind):
        sampler = pixel_sampler(one, sample_type)
        samples[one] = sampler(predicting(one, sampler.prediction.alphas_cumprod), range(3), seed=1)
    assert golden.relative_error(samples[kind], samples["eps"]) < 1e-5


@pytest.fixture(scope="module")
def latent_config(tmp_path_factory):
    return load_config(tiny_latent.model_folder(tmp_path_factory.mktemp("m")) / "config.yaml")


@pytest.mark.parametrize("kind", ["v", "x0"])
@pytest.mark.parametrize("name", ["ddim", "plms", "dpm", "vanilla"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_latent_samplers_with_guidance(latent_config, kind, name, scale):
    contexts = torch.randn(2, 2, 4, 16, generator=torch.Generator().manual_seed(3))
    short = replace(latent_config, timesteps=50)
    samples = {}
    for one in ("eps", kind):
        config = replace(short, parameterization=one)
        settings = LatentSamplerConfig(name, STEPS, 0.0, scale)
        sampler = LatentSampler(config, settings, CPU, conditions=lambda indices: (contexts[0], contexts[1]))
        samples[one] = sampler(predicting(one, config.alphas_cumprod), range(2), seed=1)
    assert golden.relative_error(samples[kind], samples["eps"]) < 1e-4


def test_a_calibration_set_holds_the_same_inputs():
    sets = {}
    for kind in ("eps", "v"):
        sampler = pixel_sampler(kind, "generalized")
        network = predicting(kind, sampler.prediction.alphas_cumprod)
        sets[kind] = make_calibration_set(network, sampler, 1, CalibrationConfig(num_timesteps=3, samples=4))
    for first, second in zip(sets["eps"].xs, sets["v"].xs, strict=True):
        assert golden.relative_error(second, first) < 1e-5


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ConfigError, match="'w': expected one of eps, x0, v"):
        Prediction("w", torch.linspace(0.9, 0.1, 10))


@pytest.mark.parametrize("step", [0, 3, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_told(step, value):
    sampler, calls = pixel_sampler("eps", "generalized"), []

    def network(x, t):
        calls.append(t)
        output = eps_network(x, t).clone()
        if len(calls) == step + 1:
            output[1, 0, 2, 2] = value
        return output

    with pytest.raises(NonFiniteError, match=rf"the UNet: .* first at step {step + 1} of {sampler.evaluations} "):
        sampler(network, range(2), seed=1)
    assert len(calls) == sampler.evaluations  # nothing is read in a step: the run of the batch ends first
