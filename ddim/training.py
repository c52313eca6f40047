"""Training of the bundled models: one loop with EMA and exact resume, and the diffusion loss of both families."""

import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.config import TrainingConfig
from qdiff.prediction import Prediction
from qdiff.utils.files import atomic_write

log = logging.getLogger(__name__)

Loss = Callable[[nn.Module, torch.Generator], Tensor]
Model = TypeVar("Model", bound=nn.Module)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate: a linear warm-up, a plateau, and a linear decay over the last `decay_fraction`."""
    left = (config.steps - step) / (config.decay_fraction * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup_steps, max(left, 0.0))


def diffusion_loss(
    data: Tensor,
    prediction: Prediction,
    config: TrainingConfig,
    conditions: Callable[[Tensor, torch.Generator], tuple] | None = None,
) -> Loss:
    """Make the squared error of eps with min-SNR weights (Hang et al. 2023, arXiv 2303.09556, eq. 5).

    Args:
        data: the training data, float [N, C, H, W]: images in [-1, 1], or scaled latents.
        prediction: what the network predicts, and its schedule.
        config: batch size, gamma, and whether to mirror images.
        conditions: from the indices of a batch to further arguments of the model.
    """
    alphas_cumprod = prediction.alphas_cumprod

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(data), (config.batch_size,), generator=generator)
        x0 = data[index]
        if config.flip:
            flip = torch.rand(config.batch_size, generator=generator).to(x0.device) < 0.5
            x0 = torch.where(flip[:, None, None, None], x0.flip(3), x0)
        t = torch.randint(0, len(alphas_cumprod), (config.batch_size,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        a = alphas_cumprod[t].float()
        x_t = a.sqrt()[:, None, None, None] * x0.cpu() + (1 - a).sqrt()[:, None, None, None] * noise
        weight = ((1 - a) / a * config.min_snr_gamma).clamp(max=1.0).to(x0.device)  # min(SNR, gamma) / SNR
        x_t = x_t.to(x0.device).contiguous(memory_format=torch.channels_last)
        extra = conditions(index, generator) if conditions else ()
        with torch.autocast(x0.device.type, torch.bfloat16):
            output = model(x_t, t.to(x0.device), *extra)
        eps = prediction.eps(x_t, t.to(x0.device), output.float())
        return (weight * (eps - noise.to(x0.device)).square().mean(dim=(1, 2, 3))).mean()

    return loss


def train(model: Model, loss: Loss, config: TrainingConfig, state_file: Path, save_every: int = 250) -> Model:
    """Minimize `loss(model, generator)`.

    Iteration i uses a random generator seeded by (seed, i). A run that continues from `state_file` therefore repeats
    exactly what an uninterrupted run does.

    Args:
        model: the network; its parameters are changed.
        loss: the loss of one batch.
        config: the training settings.
        state_file: the file with the state of the training. It is read if it exists.
        save_every: iterations between two writes of `state_file`.

    Returns:
        A copy of the network with the exponential moving averages of the parameters.
    """
    channels_last = torch.channels_last
    model = model.to(memory_format=channels_last).train()  # type: ignore[call-overload]  # the stubs lack this overload
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-3, betas=(0.9, 0.99))
    start = _load_state(state_file, model, ema, optimizer)
    progress = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="training", unit="step")
    began, mean_loss = time.monotonic(), None
    for step in progress:
        value = loss(model, torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.step()
        _update_ema(ema, model, min(config.ema_rate, (step + 1) / (step + 10)))
        mean_loss = value.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * value.item()
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            _save_state(state_file, model, ema, optimizer, step + 1)
            log.info("step %d, loss %.4f, %.0f s", step + 1, mean_loss, time.monotonic() - began)
    return ema


@torch.no_grad()
def _update_ema(ema: nn.Module, model: nn.Module, rate: float) -> None:
    """Move the averages towards the parameters by 1 - rate, in place."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - rate)


def _save_state(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the state after `step` iterations atomically."""
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def _load_state(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore a state in place; return the number of finished iterations, or 0 if the file does not exist."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
