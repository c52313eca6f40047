"""Samplers of the latent family, all with the signature of `qdiff.samplers.SampleFunction`.

A new sampler is one function with one `register_sampler(LATENT_SAMPLERS, ...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddim.samplers import VPSchedule, dpm_solver_timesteps, evaluate, num_intervals
from ldm.config import LatentConfig
from qdiff.samplers import Callback, Denoiser, Noise, Sampler, register_sampler
from qdiff.utils.registry import Registry

LATENT_SAMPLERS: "Registry[Sampler[LatentSamplerConfig]]" = Registry("sampler")


@dataclass(frozen=True)
class LatentSamplerConfig:
    """Settings of a latent sampler.

    Attributes:
        sampler: a name of `LATENT_SAMPLERS`: ddim, plms, dpm or vanilla.
        timesteps: number of sampling steps, 1 to the number of time steps of the model. `vanilla` ignores it.
        eta: the amount of noise that DDIM adds, 0 (none) to 1 (as much as DDPM).
        scale: strength of classifier-free guidance; 1 is none.
    """

    sampler: str = "ddim"
    timesteps: int = 50
    eta: float = 0.0
    scale: float = 1.0

    def validate(self, config: LatentConfig) -> "LatentSamplerConfig":
        """Return self.

        Raises:
            ConfigError: a setting cannot work with this model.
        """
        LATENT_SAMPLERS.get(self.sampler).validate(self.timesteps, self.eta, config.timesteps)
        return self


def latent_timesteps(num_timesteps: int, total: int = 1000) -> Tensor:
    """Return the time steps of DDIM and PLMS: every (total // num_timesteps)-th time step, plus one.

    Args:
        num_timesteps: number of sampling steps. The published spacing can give more (400 of 1000 gives 500).
        total: number of time steps of the model. A time step beyond the last one becomes the last one.

    Returns:
        Time steps, int64, ascending, all different.
    """
    return torch.tensor(sorted({min(t + 1, total - 1) for t in range(0, total, total // num_timesteps)}))


def _spaced_timesteps(config: LatentSamplerConfig, total: int) -> Tensor:
    return latent_timesteps(config.timesteps, total)


def _continuous_timesteps(config: LatentSamplerConfig, total: int) -> Tensor:
    return dpm_solver_timesteps(config.timesteps, total)


def _all_timesteps(config: LatentSamplerConfig, total: int) -> Tensor:
    return torch.arange(total)


def _one_more(timesteps: Tensor) -> int:
    """Return the number of evaluations of PLMS: its first step, an improved Euler step, evaluates the network twice."""
    return len(timesteps) + 1


def _alphas(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha-bar at the time steps and at their predecessors, float32; the first predecessor is time step 0."""
    a = alphas_cumprod.float()[timesteps]
    return a, torch.cat([alphas_cumprod[:1].float(), a[:-1]])


def ddim_sigmas(a: Tensor, a_prev: Tensor, eta: float) -> Tensor:
    """Return the standard deviations of DDIM's noise (Song et al. 2021, arXiv 2010.02502, eq. 16).

    Args:
        a: alpha-bar at the time steps, [S].
        a_prev: alpha-bar at their predecessors, [S].
        eta: the amount of noise, 0 to 1.
    """
    return eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()


def _ddim_update(x: Tensor, eps: Tensor, a: Tensor, a_prev: Tensor, sigma: Tensor) -> Tensor:
    """Step from alpha-bar `a` to `a_prev` (arXiv 2010.02502, eq. 12 without its random term)."""
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps


@register_sampler(LATENT_SAMPLERS, "ddim", _spaced_timesteps, stochastic=True, uses_eta=True)
def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12). It is deterministic at eta 0."""
    steps, (a, a_prev) = timesteps.tolist(), _alphas(alphas_cumprod, timesteps)
    sigmas = ddim_sigmas(a, a_prev, eta)
    for i in reversed(range(len(steps))):
        eps = evaluate(denoiser, x, steps[i], callback)
        x = _ddim_update(x, eps, a[i], a_prev[i], sigmas[i])
        if eta:
            x = x + sigmas[i] * noise()
    return x


@register_sampler(LATENT_SAMPLERS, "plms", _spaced_timesteps, stochastic=False, num_evaluations=_one_more)
def sample_plms(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Pseudo linear multistep sampling (Liu et al. 2022, arXiv 2202.09778).

    The first step is an improved Euler step. Adams-Bashforth steps of order 2, 3 and 4 on eps follow.
    """
    steps, (a, a_prev) = timesteps.tolist(), _alphas(alphas_cumprod, timesteps)
    zero = torch.zeros(())
    history: list[Tensor] = []
    for i in reversed(range(len(steps))):
        eps = evaluate(denoiser, x, steps[i], callback)
        if not history:
            x_next = _ddim_update(x, eps, a[i], a_prev[i], zero)
            average = (eps + evaluate(denoiser, x_next, steps[max(i - 1, 0)], callback)) / 2
        elif len(history) == 1:
            average = (3 * eps - history[-1]) / 2
        elif len(history) == 2:
            average = (23 * eps - 16 * history[-1] + 5 * history[-2]) / 12
        else:
            average = (55 * eps - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        history = [*history[-2:], eps]
        x = _ddim_update(x, average, a[i], a_prev[i], zero)
    return x


@register_sampler(LATENT_SAMPLERS, "dpm", _continuous_timesteps, stochastic=False, num_evaluations=num_intervals)
def sample_dpm_solver_2m(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++ 2M, uniform in time (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first step has order 1. With fewer than 15 steps the last step has order 1 as well.
    """
    schedule = VPSchedule(alphas_cumprod)
    grid, steps = timesteps.numpy(), num_intervals(timesteps)
    before: Tensor | None = None
    h_before = 0.0
    for i in range(steps):
        s, t = grid[i], grid[i + 1]
        eps = evaluate(denoiser, x, schedule.network_time(s), callback)
        x0 = (x - schedule.sigma(s) * eps) / schedule.alpha(s)
        h = schedule.lam(t) - schedule.lam(s)
        estimate = x0
        if before is not None and not (i == steps - 1 and steps < 15):
            estimate = x0 + 0.5 * (x0 - before) * h / h_before
        x = (schedule.sigma(t) / schedule.sigma(s)) * x - schedule.alpha(t) * np.expm1(-h) * estimate
        before, h_before = x0, h
    return x


@register_sampler(LATENT_SAMPLERS, "vanilla", _all_timesteps, stochastic=True)
def sample_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Ancestral DDPM sampling over every time step (Ho et al. 2020, arXiv 2006.11239, eq. 7).

    x_0 is clipped, and the variance is that of the posterior.
    """
    a = alphas_cumprod
    a_prev = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
    betas = 1 - a / a_prev
    variance = betas * (1 - a_prev) / (1 - a)
    sigma = torch.cat([variance[1:2], variance[1:]]).sqrt().float()
    first, second = (betas * a_prev.sqrt() / (1 - a)).float(), ((1 - a_prev) * (1 - betas).sqrt() / (1 - a)).float()
    for t in reversed(timesteps.tolist()):
        eps = evaluate(denoiser, x, t, callback)
        x0 = ((1 / a[t]).sqrt().float() * x - (1 / a[t] - 1).sqrt().float() * eps).clamp(-1, 1)
        x = first[t] * x0 + second[t] * x
        if t > 0:
            x = x + sigma[t] * noise()
    return x


class Guided:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6): eps = eps_u + scale (eps_c - eps_u).

    The network evaluates both contexts in one batch, the unconditional one first. Without guidance it evaluates the
    conditional context alone.

    Args:
        network: eps(x_t, t, context).
        context: conditional contexts of the batch, [N, L, D].
        unconditional: unconditional contexts of the batch, [N, L, D]. None switches guidance off.
        scale: strength of the guidance. 1 switches it off.
    """

    def __init__(
        self, network: Callable[..., Tensor], context: Tensor, unconditional: Tensor | None, scale: float
    ) -> None:
        self.network, self.scale = network, scale
        self.guided = unconditional is not None and scale != 1.0
        self.context = context if unconditional is None or not self.guided else torch.cat([unconditional, context])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in `x` [N, C, h, w] at times `t` [N]."""
        if not self.guided:
            return self.network(x, t, self.context)
        eps_u, eps_c = self.network(torch.cat([x, x]), torch.cat([t, t]), self.context).chunk(2)
        return eps_u + self.scale * (eps_c - eps_u)
