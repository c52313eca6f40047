"""Noise that depends on (seed, index) alone: not on the batch, the device, or the number of processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SAMPLING, CALIBRATION = 0, 1  # streams: the same seed gives them different images


class NoiseSource:
    """Standard normal noise for a batch of images, one counter-based generator (Philox) per image.

    Args:
        seed: 0 to 2^63 - 1. indices: the images of the batch. shape: of one image. device: where the
            noise is put; it is always drawn on the CPU, so that every device sees the same.
        stream: SAMPLING or CALIBRATION.

    Each call draws the next [N, *shape], float32.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        stream: int = SAMPLING,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed}: expected 0 to 2^63 - 1")
        self.shape, self.device = tuple(shape), device
        self.generators = [np.random.Generator(np.random.Philox(key=[seed + (stream << 63), i])) for i in indices]

    def __call__(self) -> Tensor:
        draws = [generator.standard_normal(self.shape, dtype=np.float32) for generator in self.generators]
        return torch.from_numpy(np.stack(draws)).to(self.device)
