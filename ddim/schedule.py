"""Noise schedules of the pixel family."""

import numpy as np
import torch
from torch import Tensor

from ddim.config import DiffusionConfig
from qdiff.prediction import Prediction


def make_betas(config: DiffusionConfig) -> Tensor:
    """The betas in float64, [num_diffusion_timesteps] (Ho et al. 2020, section 4: linear in beta)."""
    return torch.from_numpy(
        np.linspace(config.beta_start, config.beta_end, config.num_diffusion_timesteps, dtype=np.float64)
    )


def make_alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """alpha-bar_t in float64, [num_diffusion_timesteps]."""
    return torch.cumprod(1.0 - make_betas(config), dim=0)


def make_prediction(config: DiffusionConfig) -> Prediction:
    """What the network predicts under this schedule."""
    return Prediction(config.parameterization, make_alphas_cumprod(config))
