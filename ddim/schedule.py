"""Noise schedules of the pixel family."""

import numpy as np
import torch
from torch import Tensor

from ddim.config import DiffusionConfig
from qdiff.prediction import Prediction


def make_betas(config: DiffusionConfig) -> Tensor:
    """Return the betas, linear in the time step (Ho et al. 2020, arXiv 2006.11239, section 4), float64 [T]."""
    return torch.from_numpy(
        np.linspace(config.beta_start, config.beta_end, config.num_diffusion_timesteps, dtype=np.float64)
    )


def make_alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """Return alpha-bar_t, the cumulative products of 1 - beta, float64 [T]."""
    return torch.cumprod(1.0 - make_betas(config), dim=0)


def make_prediction(config: DiffusionConfig) -> Prediction:
    """Return the conversion from the network's output to eps under this schedule."""
    return Prediction(config.parameterization, make_alphas_cumprod(config))
