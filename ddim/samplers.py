"""Samplers of the pixel family: plain functions with one signature.

    sample(denoiser, x, alphas_cumprod, steps, noise, callback) -> x_0 [N, C, H, W], about [-1, 1]

denoiser: eps(x_t, t) with t [N]. x: starting noise. alphas_cumprod: float64 [T]. noise: draws one
standard normal tensor of the shape of x per call (unused where the sampler is deterministic).
callback(x_t, t, eps): sees every evaluation of the network.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
Callback = Callable[[Tensor, Tensor, Tensor], None]


def ddim_steps(skip_type: str, steps: int, total: int = 1000) -> list[int]:
    """The time steps of DDIM, ascending (Song et al. 2021, arXiv 2010.02502, section D.2).

    `uniform`: every (total // steps)-th. `quad`: squares of `steps` even points of [0, sqrt(0.8 total)];
    neighbors can coincide (4 of 100), and a repeated step does nothing at eta 0.
    """
    if skip_type == "uniform":
        return list(range(0, total, total // steps))
    if skip_type == "quad":
        return [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), steps) ** 2]
    raise ValueError(f"skip_type {skip_type!r}: expected uniform or quad")


def evaluate(denoiser: Denoiser, x: Tensor, t: float, callback: Callback | None) -> Tensor:
    """eps at time `t` for the whole batch, shown to the callback."""
    times = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
    eps = denoiser(x, times)
    if callback is not None:
        callback(x, times, eps)
    return eps


def _alpha(alphas_cumprod: Tensor, t: int) -> Tensor:
    """alpha-bar at step t in float32; 1 at t = -1."""
    return (alphas_cumprod[t] if t >= 0 else torch.ones(())).float()


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: list[int],
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Generalized DDIM (arXiv 2010.02502, eq. 12 and 16); eta 0 is deterministic, 1 as noisy as DDPM."""
    for t, t_next in zip(reversed(steps), reversed([-1, *steps[:-1]]), strict=True):
        a, a_next = _alpha(alphas_cumprod, t), _alpha(alphas_cumprod, t_next)
        eps = evaluate(denoiser, x, t, callback)
        x0 = (x - eps * (1 - a).sqrt()) / a.sqrt()
        sigma = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next - sigma**2).sqrt() * eps
        if eta:
            x = x + sigma * noise()
    return x


def sample_ddpm(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: list[int],
    noise: Noise,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with the larger variance and clipped x_0 (Ho et al. 2020, eq. 7; `ddpm_noisy`)."""
    for t, t_next in zip(reversed(steps), reversed([-1, *steps[:-1]]), strict=True):
        a, a_next = _alpha(alphas_cumprod, t), _alpha(alphas_cumprod, t_next)
        beta = 1 - a / a_next
        eps = evaluate(denoiser, x, t, callback)
        x0 = (x / a.sqrt() - (1 / a - 1).sqrt() * eps).clamp(-1, 1)
        mean = (a_next.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - a_next) * x) / (1 - a)
        x = mean + beta.sqrt() * noise() if t > 0 else mean
    return x


class VPSchedule:
    """log alpha, sigma and lambda in continuous time t in [1/T, 1], log alpha interpolated linearly."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.total = len(alphas_cumprod)
        self.times = np.arange(1, self.total + 1) / self.total
        self.log_alphas = 0.5 * np.log(alphas_cumprod.cpu().numpy())

    def log_alpha(self, t: float) -> float:
        return float(np.interp(t, self.times, self.log_alphas))

    def alpha(self, t: float) -> float:
        return float(np.exp(self.log_alpha(t)))

    def sigma(self, t: float) -> float:
        return float(np.sqrt(-np.expm1(2 * self.log_alpha(t))))

    def lam(self, t: float) -> float:
        """Half the log signal-to-noise ratio."""
        return self.log_alpha(t) - float(np.log(self.sigma(t)))

    def network_time(self, t: float) -> float:
        """The time the network is given: (t - 1/T) * T, unrounded."""
        return (t - 1 / self.total) * self.total


def dpm_solver_orders(steps: int) -> list[int]:
    """Orders of the single steps of DPM-Solver-3 for `steps` evaluations (arXiv 2206.00927, appendix D)."""
    if steps % 3 == 0:
        return [3] * (steps // 3 - 1) + [2, 1]
    return [3] * (steps // 3) + [steps % 3]


def sample_dpm_solver(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ of order 3, single step, data prediction, uniform in time (arXiv 2211.01095)."""
    schedule = VPSchedule(alphas_cumprod)
    grid = np.linspace(1.0, 1.0 / schedule.total, steps + 1)
    position = 0

    def predict(x: Tensor, t: float) -> Tensor:
        eps = evaluate(denoiser, x, schedule.network_time(t), callback)
        return (x - schedule.sigma(t) * eps) / schedule.alpha(t)

    for order in dpm_solver_orders(steps):
        x = _single_step(predict, schedule, x, grid[position], grid[position + order], order)
        position += order
    return x


def _single_step(
    predict: Callable[[Tensor, float], Tensor], schedule: VPSchedule, x: Tensor, s: float, t: float, order: int
) -> Tensor:
    """One step from time s to t with `order` evaluations (arXiv 2211.01095, algorithms 1; 2206.00927, 2)."""
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
