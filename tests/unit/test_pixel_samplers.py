"""Invariants of the pixel samplers."""

import re

import pytest
import torch

from ddim.config import DiffusionConfig
from ddim.samplers import (
    PIXEL_SAMPLERS,
    PixelSamplerConfig,
    ddim_timesteps,
    dpm_solver_orders,
    dpm_solver_timesteps,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
)
from ddim.schedule import make_alphas_cumprod
from qdiff.errors import ConfigError
from qdiff.samplers import register_sampler
from qdiff.utils.registry import Registry
from tests.support import golden

ALPHAS = make_alphas_cumprod(DiffusionConfig())


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


def test_quad_steps_repeat_as_published():
    steps = ddim_timesteps("quad", 100).tolist()
    assert len(steps) == 100 and len(set(steps)) == 96 and max(steps) == 800


@pytest.mark.parametrize("steps", range(3, 14))
def test_orders_spend_exactly_the_evaluations(steps):
    assert sum(dpm_solver_orders(steps)) == steps
    calls = []
    timesteps = dpm_solver_timesteps(steps)
    sample_dpm_solver(lambda x, t: calls.append(t[0].item()) or x, torch.randn(1, 1, 4, 4), ALPHAS, timesteps, no_noise)
    assert len(calls) == steps and calls == sorted(calls, reverse=True)


class Gaussian:
    """The exact noise prediction for data ~ N(mean, std^2): the samplers must then give that distribution."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.var = mean, std**2

    def __call__(self, x, t):
        a = ALPHAS[t.long().clamp(0, 999)].float()[:, None]
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.var + 1 - a)


@pytest.mark.parametrize("name", ["ddim", "ddim_eta1", "ddpm_noisy", "dpm_solver"])
def test_samplers_recover_a_gaussian(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, generator=generator)

    def noise():
        return torch.randn(x.shape, generator=generator)

    denoiser, steps = Gaussian(0.3, 0.2), torch.arange(1000)  # few steps shrink the variance at eta 1
    found = {
        "ddim": lambda: sample_ddim(denoiser, x, ALPHAS, steps, no_noise),
        "ddim_eta1": lambda: sample_ddim(denoiser, x, ALPHAS, steps, noise, eta=1.0),
        "ddpm_noisy": lambda: sample_ddpm(denoiser, x, ALPHAS, steps, noise),
        "dpm_solver": lambda: sample_dpm_solver(denoiser, x, ALPHAS, dpm_solver_timesteps(50), no_noise),
    }[name]()
    assert found.mean().item() == pytest.approx(0.3, abs=0.01)
    assert found.std().item() == pytest.approx(0.2, rel=0.05)


def test_repeated_steps_change_nothing_at_eta_0():
    torch.manual_seed(0)
    x = torch.randn(2, 3)
    denoiser = Gaussian(0.0, 0.5)
    once = sample_ddim(denoiser, x, ALPHAS, torch.tensor([0, 100, 500]), no_noise)
    twice = sample_ddim(denoiser, x, ALPHAS, torch.tensor([0, 100, 100, 500]), no_noise)
    assert golden.relative_error(twice, once) < 1e-6


def test_a_new_sampler_is_one_function_with_one_registration():
    registry = Registry("sample_type")

    @register_sampler(
        registry, "euler", lambda config, total: ddim_timesteps("uniform", config.timesteps), stochastic=False
    )
    def sample_euler(denoiser, x, alphas_cumprod, timesteps, noise, callback=None, eta=0.0):
        return x

    sampler = registry.get("euler")
    assert sampler.sample is sample_euler and registry.names() == ["euler"]
    assert sampler.num_evaluations(sampler.timesteps(PixelSamplerConfig(timesteps=10), 1000)) == 10
    with pytest.raises(ValueError, match="sample_type 'euler': already registered"):
        registry.register("euler", sampler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PixelSamplerConfig("heun"), "sample_type 'heun': expected one of generalized, dpm_solver, ddpm_noisy"),
        (PixelSamplerConfig(timesteps=0), "timesteps 0: expected 1 to 1000"),
        (PixelSamplerConfig(eta=2.0), "eta 2: expected 0 to 1"),
        (PixelSamplerConfig("dpm_solver", eta=0.5), "dpm_solver is deterministic: expected eta 0, found 0.5"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings.validate(DiffusionConfig())


def test_every_pixel_sampler_visits_as_many_times_as_it_says():
    for name in PIXEL_SAMPLERS.names():
        sampler, calls = PIXEL_SAMPLERS.get(name), []
        timesteps = sampler.timesteps(PixelSamplerConfig(name, timesteps=7), len(ALPHAS))
        x = torch.randn(1, 2)
        sampler.sample(lambda x, t, calls=calls: calls.append(t) or x, x, ALPHAS, timesteps, lambda x=x: x)
        assert len(calls) == sampler.num_evaluations(timesteps), name
