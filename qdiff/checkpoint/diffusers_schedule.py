"""The noise schedule and the prediction that `scheduler_config.json` of a folder of diffusers names."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from qdiff.checkpoint.diffusers_folder import DiffusersFolder

# Schedulers of networks that were trained with the betas of the file (variance-preserving diffusion in discrete time).
SCHEDULERS = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
SCHEDULER_CLASSES = tuple(f"diffusers.{name}" for name in SCHEDULERS)
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
EXPECTED = {
    "trained_betas": (None, None),
    "thresholding": (False, False),
    "rescale_betas_zero_snr": (False, False),
    "use_flow_sigmas": (False, False),
}
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")  # the network predicts no variance


@dataclass(frozen=True)
class NoiseSchedule:
    """What a network was trained with.

    Attributes:
        beta_start: beta of the first time step.
        beta_end: beta of the last time step.
        num_timesteps: number of time steps T.
        parameterization: what the network predicts: eps, x0 or v (`qdiff.prediction`).
        clip_x0: the largest |x_0| that a sampler may predict (`clip_sample`); infinity: there is no limit.
    """

    beta_start: float
    beta_end: float
    num_timesteps: int
    parameterization: str
    clip_x0: float


def read_schedule(folder: DiffusersFolder, beta_schedule: str, clipping: Collection[bool]) -> NoiseSchedule:
    """Read `scheduler_config.json`.

    The settings that belong to the sampler (such as `steps_offset` or `timestep_spacing`) are not read, because the
    commands have samplers of their own.

    Args:
        folder: the folder.
        beta_schedule: the supported form of the betas: `linear` or `scaled_linear`.
        clipping: the supported values of `clip_sample`.

    Raises:
        CheckpointError: the file is missing or damaged.
        ConfigError: a setting has a value that is not supported. The message has its name and both values.
    """
    part = folder.scheduler()
    settings = part.settings(*SCHEDULERS)
    settings.expect({"beta_schedule": ("linear", beta_schedule)} | EXPECTED)
    prediction = settings.get("prediction_type", str, "epsilon")
    if prediction not in PREDICTION_TYPES:
        settings.refuse("prediction_type", f": expected {', '.join(PREDICTION_TYPES)}", prediction)
    variance = settings.values.get("variance_type") or VARIANCES[0]
    if variance not in VARIANCES:
        settings.refuse("variance_type", f": expected {', '.join(VARIANCES)}", variance)
    clips = settings.get("clip_sample", bool, part.class_name.startswith(("DDIM", "DDPM")))
    if clips not in clipping:
        settings.refuse("clip_sample", f": expected {' or '.join(str(value).lower() for value in clipping)}", clips)
    clip_x0 = settings.get("clip_sample_range", float, 1.0) if clips else math.inf
    if not clip_x0 > 0:
        settings.refuse("clip_sample_range", ": expected a positive number", clip_x0)
    return NoiseSchedule(
        beta_start=settings.get("beta_start", float, 1e-4),
        beta_end=settings.get("beta_end", float, 0.02),
        num_timesteps=settings.get("num_train_timesteps", int, 1000),
        parameterization=PREDICTION_TYPES[prediction],
        clip_x0=clip_x0,
    )
