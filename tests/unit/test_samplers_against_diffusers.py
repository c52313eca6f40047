"""Our samplers against the schedulers of diffusers: where they must agree, and where they do not.

The table in docs/diffusers.md says the same in words.
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import ldm.samplers  # noqa: F401  # registers the samplers
from ddim.config import DiffusionConfig
from ddim.samplers import PIXEL_SAMPLERS, PixelSamplerConfig
from ddim.schedule import make_alphas_cumprod
from ldm.samplers import LATENT_SAMPLERS, LatentSamplerConfig
from qdiff.prediction import EpsNetwork, Prediction
from tests.support.tiny_diffusers import LATENT_BETAS, diffusers

PIXEL_ALPHAS = make_alphas_cumprod(DiffusionConfig())
PIXEL_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ROOTS = torch.linspace(LATENT_BETAS["beta_start"] ** 0.5, LATENT_BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float64)
LATENT_ALPHAS = torch.cumprod(1 - ROOTS**2, dim=0)
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
SHAPE = (2, 3, 4, 4)
CLOSE = 1e-5


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth function in the place of a network: it depends on the sample and on the time step."""
    return torch.sin(2 * x + t.double().reshape(-1, 1, 1, 1) / 300) + 0.2 * x


def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def theirs(scheduler, steps: int, network=network, **options) -> Tensor:
    """Sample with a scheduler of diffusers, as its pipelines do."""
    scheduler.set_timesteps(steps)
    x = start() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def ours(sampler, settings, alphas: Tensor, kind: str = "eps", clip_x0: float | None = None) -> Tensor:
    """Sample with a sampler of ours; its noise is what `draws` gives to a scheduler of diffusers."""
    denoiser = EpsNetwork(network, Prediction(kind, alphas), "the function")
    noise = partial(torch.randn, SHAPE, dtype=torch.float64, generator=draws())
    times = sampler.timesteps(settings, len(alphas))
    return sampler.clipped(clip_x0)(denoiser, start(), alphas, times, noise, eta=settings.eta)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_pixel_ddim(kind, eta, clip):
    scheduler = diffusers.DDIMScheduler(**PIXEL_BETAS, clip_sample=clip, prediction_type=PREDICTIONS[kind])
    expected = theirs(scheduler, 50, eta=eta, generator=draws())
    settings = PixelSamplerConfig("generalized", "uniform", 50, eta)
    found = ours(PIXEL_SAMPLERS.get("generalized"), settings, PIXEL_ALPHAS, kind, 1.0 if clip else math.inf)
    assert distance(found, expected) < CLOSE


def test_clipping_matters():
    settings, sampler = PixelSamplerConfig("generalized", "uniform", 50), PIXEL_SAMPLERS.get("generalized")
    clipped, free = (ours(sampler, settings, PIXEL_ALPHAS, clip_x0=limit) for limit in (1.0, None))
    assert distance(clipped, free) > 0.01 and clipped.abs().max() <= 1


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_pixel_ddpm(kind):
    options = {"variance_type": "fixed_large", "clip_sample": True, "prediction_type": PREDICTIONS[kind]}
    expected = theirs(diffusers.DDPMScheduler(**PIXEL_BETAS, **options), 50, generator=draws())
    settings = PixelSamplerConfig("ddpm_noisy", "uniform", 50)
    assert distance(ours(PIXEL_SAMPLERS.get("ddpm_noisy"), settings, PIXEL_ALPHAS, kind), expected) < CLOSE


def latent_scheduler(kind: str, **options):
    shared = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    return diffusers.DDIMScheduler(**LATENT_BETAS, **shared, prediction_type=PREDICTIONS[kind], **options)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_latent_ddim(kind, eta):
    expected = theirs(latent_scheduler(kind), 50, eta=eta, generator=draws())
    settings = LatentSamplerConfig("ddim", 50, eta)
    assert distance(ours(LATENT_SAMPLERS.get("ddim"), settings, LATENT_ALPHAS, kind), expected) < CLOSE


def pndm(kind: str):
    options = {"skip_prk_steps": True, "steps_offset": 1, "prediction_type": PREDICTIONS[kind]}
    return diffusers.PNDMScheduler(**LATENT_BETAS, **options)


def plms(kind: str) -> Tensor:
    return ours(LATENT_SAMPLERS.get("plms"), LatentSamplerConfig("plms", 50), LATENT_ALPHAS, kind)


def test_plms():
    assert distance(plms("eps"), theirs(pndm("eps"), 50)) < CLOSE


def test_plms_of_a_v_prediction_turned_into_eps():
    to_eps = Prediction("v", LATENT_ALPHAS).eps
    expected = theirs(pndm("eps"), 50, network=lambda x, t: to_eps(x, t, network(x, t)))
    assert distance(plms("v"), expected) < CLOSE


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ancestral_sampling_of_latents(kind):
    options = {"variance_type": "fixed_small", "clip_sample": True, "prediction_type": PREDICTIONS[kind]}
    betas = LATENT_BETAS | {"beta_end": 0.1, "num_train_timesteps": 100}
    scheduler = diffusers.DDPMScheduler(**betas, **options)
    alphas = scheduler.alphas_cumprod.double()
    found = ours(LATENT_SAMPLERS.get("vanilla"), LatentSamplerConfig("vanilla"), alphas, kind)
    assert distance(found, theirs(scheduler, 100, generator=draws())) < CLOSE


# --- where they do not agree


def test_plms_of_a_v_prediction():
    """Ours averages eps over the last steps, as the paper does; PNDMScheduler averages v and converts the average."""
    assert CLOSE < distance(plms("v"), theirs(pndm("v"), 50)) < 0.1


def test_dpm_solver_is_close_but_visits_other_times():
    """Ours has the continuous times of the paper; diffusers rounds them to whole time steps."""
    expected = theirs(diffusers.DPMSolverMultistepScheduler(**LATENT_BETAS), 50)
    found = ours(LATENT_SAMPLERS.get("dpm"), LatentSamplerConfig("dpm", 50), LATENT_ALPHAS)
    assert CLOSE < distance(found, expected) < 0.1


@pytest.mark.parametrize("steps", [30, 400])
def test_numbers_of_steps_that_do_not_divide_the_time_steps(steps):
    """Ours takes every (1000 // S)-th time step to the end, as the published scripts do; diffusers stops after S."""
    times = LATENT_SAMPLERS.get("ddim").timesteps(LatentSamplerConfig("ddim", steps), 1000)
    scheduler = latent_scheduler("eps")
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps < len(times)
    assert times[:steps].tolist() == scheduler.timesteps.flip(0).tolist()


def test_the_defaults_of_diffusers_end_elsewhere():
    """Its DDIM steps to alpha-bar 1 unless `set_alpha_to_one` is false; latent models end at alpha-bar of step 0."""
    options = {"steps_offset": 1, "clip_sample": False}
    expected = theirs(diffusers.DDIMScheduler(**LATENT_BETAS, **options), 50)
    found = ours(LATENT_SAMPLERS.get("ddim"), LatentSamplerConfig("ddim", 50), LATENT_ALPHAS)
    assert CLOSE < distance(found, expected) < 0.1


def test_other_spacings_are_other_times():
    """`trailing` spacing, which some folders name, has no counterpart here: a command chooses its own times."""
    scheduler = latent_scheduler("eps", timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    times = LATENT_SAMPLERS.get("ddim").timesteps(LatentSamplerConfig("ddim", 50), 1000)
    assert not set(scheduler.timesteps.tolist()) & set(times.tolist())
