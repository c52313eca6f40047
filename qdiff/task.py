"""A model of a family, ready to be quantized: what the commands need of it, whatever its family."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qdiff.architecture import Architecture
from qdiff.calibration.data import CalibrationSet
from qdiff.config import CalibrationConfig
from qdiff.prediction import Prediction


@dataclass(frozen=True)
class QuantizationTask:
    """A full-precision model with the sampler that draws its calibration set.

    Attributes:
        architecture: what quantization must know of the network.
        unet_config: the network's configuration, for `architecture.make_unet`.
        input_shape: (C, H, W) of x_t.
        evaluations: calls of the network for one image.
        load_unet: loads the full-precision network, on the CPU.
        make_calibration_set: samples with a network and records its inputs, as the recipe says.
        prediction: what the network predicts.
        weight_scale_method: the family's published scale rule of weights.
        act_scale_method: the family's published scale rule of activations.
        context_dim: the width of the contexts that the network takes; None: it takes none.
        save_model_parts: writes the rest of a latent model (first stage and conditioner) to a file; None: there is
            none.
    """

    architecture: Architecture
    unet_config: dict[str, Any]
    input_shape: tuple[int, int, int]
    evaluations: int
    load_unet: Callable[[], nn.Module]
    make_calibration_set: Callable[[nn.Module, CalibrationConfig], CalibrationSet]
    prediction: Prediction
    weight_scale_method: str = "max"
    act_scale_method: str = "max"
    context_dim: int | None = None
    save_model_parts: Callable[[Path], None] | None = None
