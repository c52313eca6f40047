"""Samplers of the latent family, with the signature of the pixel family's (`ddim.samplers`)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddim.samplers import Callback, Denoiser, Noise, VPSchedule, evaluate


def latent_steps(steps: int, total: int = 1000) -> list[int]:
    """The time steps of DDIM and PLMS, ascending: every (total // steps)-th, plus one.

    Their number is that of the range, not `steps` (400 gives 500). An entry beyond the schedule
    becomes its last one.
    """
    return sorted({min(t + 1, total - 1) for t in range(0, total, total // steps)})


def _alphas(alphas_cumprod: Tensor, steps: list[int]) -> tuple[Tensor, Tensor]:
    """alpha-bar at the steps and at those before them, float32; that of the first step's predecessor is alpha-bar_0."""
    a = alphas_cumprod.float()[steps]
    return a, torch.cat([alphas_cumprod[:1].float(), a[:-1]])


def ddim_sigmas(a: Tensor, a_prev: Tensor, eta: float) -> Tensor:
    """Standard deviations of DDIM's noise (arXiv 2010.02502, eq. 16)."""
    return eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()


def _ddim_update(x: Tensor, eps: Tensor, a: Tensor, a_prev: Tensor, sigma: Tensor) -> Tensor:
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: list[int],
    noise: Noise,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12); eta 0 is deterministic."""
    a, a_prev = _alphas(alphas_cumprod, steps)
    sigmas = ddim_sigmas(a, a_prev, eta)
    for i in reversed(range(len(steps))):
        eps = evaluate(denoiser, x, steps[i], callback)
        x = _ddim_update(x, eps, a[i], a_prev[i], sigmas[i])
        if eta:
            x = x + sigmas[i] * noise()
    return x


def sample_plms(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: list[int],
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, arXiv 2202.09778): an improved Euler step, then Adams-Bashforth 2, 3, 4 on eps."""
    a, a_prev = _alphas(alphas_cumprod, steps)
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


def sample_dpm_solver_2m(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ 2M, uniform in time (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first step is of order 1; for fewer than 15 steps the last one is too.
    """
    schedule = VPSchedule(alphas_cumprod)
    grid = np.linspace(1.0, 1.0 / schedule.total, steps + 1)
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


def sample_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    alphas_cumprod: Tensor,
    steps: list[int],
    noise: Noise,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral DDPM sampling over every time step, x_0 clipped, posterior variance (Ho et al. 2020, eq. 7)."""
    a = alphas_cumprod
    a_prev = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
    betas = 1 - a / a_prev
    variance = betas * (1 - a_prev) / (1 - a)
    sigma = torch.cat([variance[1:2], variance[1:]]).sqrt().float()
    first, second = (betas * a_prev.sqrt() / (1 - a)).float(), ((1 - a_prev) * (1 - betas).sqrt() / (1 - a)).float()
    for t in reversed(steps):
        eps = evaluate(denoiser, x, t, callback)
        x0 = ((1 / a[t]).sqrt().float() * x - (1 / a[t] - 1).sqrt().float() * eps).clamp(-1, 1)
        x = first[t] * x0 + second[t] * x
        if t > 0:
            x = x + sigma[t] * noise()
    return x


class Guided:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6): e = e_u + scale (e_c - e_u), one batch of both.

    Args:
        network: eps(x_t, t, context), called with both contexts in one batch, or with `context` alone without guidance.
        context, unconditional: [N, L, D] each, for the batch that will be sampled.
    """

    def __init__(
        self, network: Callable[..., Tensor], context: Tensor, unconditional: Tensor | None, scale: float
    ) -> None:
        self.network, self.scale = network, scale
        self.guided = unconditional is not None and scale != 1.0
        self.context = context if unconditional is None or not self.guided else torch.cat([unconditional, context])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.guided:
            return self.network(x, t, self.context)
        without, given = self.network(torch.cat([x, x]), torch.cat([t, t]), self.context).chunk(2)
        return without + self.scale * (given - without)
