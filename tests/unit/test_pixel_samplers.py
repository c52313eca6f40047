"""Invariants of the pixel samplers."""

import pytest
import torch

from ddim.config import DiffusionConfig
from ddim.samplers import ddim_steps, dpm_solver_orders, sample_ddim, sample_ddpm, sample_dpm_solver
from ddim.schedule import make_alphas_cumprod
from tests.support import golden

ALPHAS = make_alphas_cumprod(DiffusionConfig())


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


def test_quad_steps_repeat_as_published():
    steps = ddim_steps("quad", 100)
    assert len(steps) == 100 and len(set(steps)) == 96 and max(steps) == 800


@pytest.mark.parametrize("steps", range(3, 14))
def test_orders_spend_exactly_the_evaluations(steps):
    assert sum(dpm_solver_orders(steps)) == steps
    calls = []
    sample_dpm_solver(lambda x, t: calls.append(t[0].item()) or x, torch.randn(1, 1, 4, 4), ALPHAS, steps)
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

    denoiser, steps = Gaussian(0.3, 0.2), list(range(1000))  # few steps shrink the variance at eta 1
    found = {
        "ddim": lambda: sample_ddim(denoiser, x, ALPHAS, steps, no_noise),
        "ddim_eta1": lambda: sample_ddim(denoiser, x, ALPHAS, steps, noise, eta=1.0),
        "ddpm_noisy": lambda: sample_ddpm(denoiser, x, ALPHAS, steps, noise),
        "dpm_solver": lambda: sample_dpm_solver(denoiser, x, ALPHAS, 50),
    }[name]()
    assert found.mean().item() == pytest.approx(0.3, abs=0.01)
    assert found.std().item() == pytest.approx(0.2, rel=0.05)


def test_repeated_steps_change_nothing_at_eta_0():
    torch.manual_seed(0)
    x = torch.randn(2, 3)
    denoiser = Gaussian(0.0, 0.5)
    once = sample_ddim(denoiser, x, ALPHAS, [0, 100, 500], no_noise)
    twice = sample_ddim(denoiser, x, ALPHAS, [0, 100, 100, 500], no_noise)
    assert golden.relative_error(twice, once) < 1e-6
