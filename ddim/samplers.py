"""Samplers of the pixel family, all with the signature of `qdiff.samplers.SampleFunction`.

A new sampler is one function with one `register_sampler(PIXEL_SAMPLERS, ...)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddim.config import DiffusionConfig
from qdiff.errors import ConfigError
from qdiff.samplers import Callback, Denoiser, Noise, Sampler, register_sampler
from qdiff.utils.registry import Registry

PIXEL_SAMPLERS: "Registry[Sampler[PixelSamplerConfig]]" = Registry("sample_type")


@dataclass(frozen=True)
class PixelSamplerConfig:
    """Settings of a pixel sampler.

    Attributes:
        sample_type: a name of `PIXEL_SAMPLERS`: generalized (DDIM), dpm_solver or ddpm_noisy.
        skip_type: spacing of the time steps, uniform or quad. DPM-Solver ignores it.
        timesteps: number of sampling steps, 1 to the number of time steps of the model.
        eta: the amount of noise that DDIM adds, 0 (none) to 1 (as much as DDPM).
    """

    sample_type: str = "generalized"
    skip_type: str = "uniform"
    timesteps: int = 1000
    eta: float = 0.0

    def validate(self, diffusion: DiffusionConfig) -> "PixelSamplerConfig":
        """Return self.

        Raises:
            ConfigError: a setting cannot work with this model.
        """
        sampler = PIXEL_SAMPLERS.get(self.sample_type)
        sampler.validate(self.timesteps, self.eta, diffusion.num_diffusion_timesteps)
        return self


def ddim_timesteps(skip_type: str, num_timesteps: int, total: int = 1000) -> Tensor:
    """Return the time steps of DDIM (Song et al. 2021, arXiv 2010.02502, section D.2).

    Args:
        skip_type: `uniform` takes every (total // num_timesteps)-th time step. `quad` takes the squares of
            `num_timesteps` even points of [0, sqrt(0.8 total)]. Neighbors can coincide (4 of 100), and a repeated time
            step changes nothing at eta 0.
        num_timesteps: number of sampling steps. `uniform` may return more.
        total: number of time steps of the model.

    Returns:
        Time steps, int64, ascending.

    Raises:
        ConfigError: the skip_type is unknown.
    """
    if skip_type == "uniform":
        return torch.arange(0, total, total // num_timesteps)
    if skip_type == "quad":
        return torch.from_numpy(np.linspace(0, np.sqrt(total * 0.8), num_timesteps) ** 2).long()
    raise ConfigError(f" {skip_type!r}: expected uniform or quad", field="skip_type")


def dpm_solver_timesteps(num_timesteps: int, total: int = 1000) -> Tensor:
    """Return the grid of DPM-Solver: continuous times from 1 to 1/total, uniform, float64 [num_timesteps + 1]."""
    return torch.from_numpy(np.linspace(1.0, 1.0 / total, num_timesteps + 1))


def num_intervals(grid: Tensor) -> int:
    """Return the number of intervals of a grid: DPM-Solver evaluates the network once for each."""
    return len(grid) - 1


def evaluate(denoiser: Denoiser, x: Tensor, t: float, callback: Callback | None) -> Tensor:
    """Predict the noise in `x` [N, ...] at time `t`, the same for the whole batch, and pass it to the callback."""
    times = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
    eps = denoiser(x, times)
    if callback is not None:
        callback(x, times, eps)
    return eps


def _alpha(alphas_cumprod: Tensor, t: int) -> Tensor:
    """Return alpha-bar at time step t in float32; it is 1 at t = -1."""
    return (alphas_cumprod[t] if t >= 0 else torch.ones(())).float()


def _spaced_timesteps(config: PixelSamplerConfig, total: int) -> Tensor:
    return ddim_timesteps(config.skip_type, config.timesteps, total)


def _continuous_timesteps(config: PixelSamplerConfig, total: int) -> Tensor:
    return dpm_solver_timesteps(config.timesteps, total)


def _descending_pairs(timesteps: Tensor) -> list[tuple[int, int]]:
    """Return (t, next t) from the last time step down; the first time step is followed by -1."""
    steps = timesteps.tolist()
    return list(zip(reversed(steps), reversed([-1, *steps[:-1]]), strict=True))


@register_sampler(
    PIXEL_SAMPLERS, "generalized", _spaced_timesteps, stochastic=True, uses_eta=True, uses_spacing=True, clips=True
)
def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
    clip_x0: float = math.inf,
) -> Tensor:
    """Generalized DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

    It is deterministic at eta 0, and adds as much noise as DDPM at eta 1. The published sampler does not clip x_0; if
    it is clipped, eps stays as the network predicted it, as in diffusers' DDIMScheduler.
    """
    for t, t_next in _descending_pairs(timesteps):
        a, a_next = _alpha(alphas_cumprod, t), _alpha(alphas_cumprod, t_next)
        eps = evaluate(denoiser, x, t, callback)
        x0 = ((x - eps * (1 - a).sqrt()) / a.sqrt()).clamp(-clip_x0, clip_x0)
        sigma = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next - sigma**2).sqrt() * eps
        if eta:
            x = x + sigma * noise()
    return x


@register_sampler(PIXEL_SAMPLERS, "dpm_solver", _continuous_timesteps, stochastic=False, num_evaluations=num_intervals)
def sample_dpm_solver(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++ of order 3, single-step, data prediction, uniform in time (Lu et al. 2022, arXiv 2211.01095)."""
    schedule = VPSchedule(alphas_cumprod)
    grid = timesteps.numpy()
    position = 0

    def predict(x: Tensor, t: float) -> Tensor:
        eps = evaluate(denoiser, x, schedule.network_time(t), callback)
        return (x - schedule.sigma(t) * eps) / schedule.alpha(t)

    for order in dpm_solver_orders(num_intervals(timesteps)):
        x = _single_step(predict, schedule, x, grid[position], grid[position + order], order)
        position += order
    return x


@register_sampler(PIXEL_SAMPLERS, "ddpm_noisy", _spaced_timesteps, stochastic=True, uses_spacing=True, clips=True)
def sample_ddpm(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
    clip_x0: float = 1.0,
) -> Tensor:
    """Ancestral sampling with the larger variance and a clipped x_0 (Ho et al. 2020, arXiv 2006.11239, eq. 7)."""
    for t, t_next in _descending_pairs(timesteps):
        a, a_next = _alpha(alphas_cumprod, t), _alpha(alphas_cumprod, t_next)
        beta = 1 - a / a_next
        eps = evaluate(denoiser, x, t, callback)
        x0 = (x / a.sqrt() - (1 / a - 1).sqrt() * eps).clamp(-clip_x0, clip_x0)
        mean = (a_next.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - a_next) * x) / (1 - a)
        x = mean + beta.sqrt() * noise() if t > 0 else mean
    return x


class VPSchedule:
    """The variance-preserving schedule in continuous time t in [1/T, 1]: log alpha is interpolated linearly.

    Args:
        alphas_cumprod: alpha-bar_t, float64 [T].
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.total = len(alphas_cumprod)
        self.times = np.arange(1, self.total + 1) / self.total
        self.log_alphas = 0.5 * np.log(alphas_cumprod.cpu().numpy())

    def log_alpha(self, t: float) -> float:
        """Return log alpha_t, half the logarithm of alpha-bar_t."""
        return float(np.interp(t, self.times, self.log_alphas))

    def alpha(self, t: float) -> float:
        """Return alpha_t, the factor of x_0 in x_t."""
        return float(np.exp(self.log_alpha(t)))

    def sigma(self, t: float) -> float:
        """Return sigma_t, the factor of the noise in x_t."""
        return float(np.sqrt(-np.expm1(2 * self.log_alpha(t))))

    def lam(self, t: float) -> float:
        """Return lambda_t = log(alpha_t / sigma_t), half the log signal-to-noise ratio."""
        return self.log_alpha(t) - float(np.log(self.sigma(t)))

    def network_time(self, t: float) -> float:
        """Return the time that the network receives: (t - 1/T) * T, not rounded."""
        return (t - 1 / self.total) * self.total


def dpm_solver_orders(steps: int) -> list[int]:
    """Return the orders of the single steps of DPM-Solver-3 for `steps` evaluations (arXiv 2206.00927, appendix D)."""
    if steps % 3 == 0:
        return [3] * (steps // 3 - 1) + [2, 1]
    return [3] * (steps // 3) + [steps % 3]


def _single_step(
    predict: Callable[[Tensor, float], Tensor], schedule: VPSchedule, x: Tensor, s: float, t: float, order: int
) -> Tensor:
    """Step from time s to time t with `order` evaluations (arXiv 2211.01095, algorithm 1; 2206.00927, algorithm 2)."""
    inner = np.linspace(s, t, order + 1)
    h = schedule.lam(t) - schedule.lam(s)
    phi_1 = np.expm1(-h)
    m_s = predict(x, s)

    def first_order(to: float, fraction: float) -> Tensor:
        return (schedule.sigma(to) / schedule.sigma(s)) * x - schedule.alpha(to) * np.expm1(-fraction * h) * m_s

    if order == 1:
        return first_order(t, 1.0)
    r1 = (schedule.lam(inner[1]) - schedule.lam(s)) / h
    difference = predict(first_order(inner[1], r1), inner[1]) - m_s
    if order == 2:
        return first_order(t, 1.0) - 0.5 / r1 * schedule.alpha(t) * phi_1 * difference
    r2 = (schedule.lam(inner[2]) - schedule.lam(s)) / h
    phi_22 = np.expm1(-r2 * h) / (r2 * h) + 1
    x_s2 = first_order(inner[2], r2) + r2 / r1 * schedule.alpha(inner[2]) * phi_22 * difference
    difference = predict(x_s2, inner[2]) - m_s
    return first_order(t, 1.0) + (1 / r2) * schedule.alpha(t) * (phi_1 / h + 1) * difference
