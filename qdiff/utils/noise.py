"""Noise that depends on (seed, image index) alone: not on the batch, the device or the number of processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SAMPLING, CALIBRATION = 0, 1  # two streams, so that the same seed samples different images for calibration


class NoiseSource:
    """Standard normal noise for a batch of images, from one counter-based generator (Philox) per image.

    Each call returns the next noise, float32 [N, *shape].

    Args:
        seed: 0 to 2^63 - 1.
        indices: the numbers of the batch's images.
        shape: the shape of one image.
        device: where the noise is put. It is always generated on the CPU, so that it is the same for every device.
        stream: SAMPLING or CALIBRATION.

    Raises:
        ValueError: the seed is outside its range.
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
        images = [generator.standard_normal(self.shape, dtype=np.float32) for generator in self.generators]
        return torch.from_numpy(np.stack(images)).to(self.device)
