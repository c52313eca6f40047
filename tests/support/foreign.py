"""A denoiser that knows nothing of this project, as users of `qdiff.quantize` have them."""

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(8, width)

    def forward(self, x, *, emb):
        return x + self.second(torch.relu(self.first(x) + self.time(emb)[:, :, None, None]))


class Denoiser(nn.Module):
    """A network that knows nothing of this project."""

    def __init__(self, odd=False):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(16) for _ in range(2))
        self.odd = nn.Bilinear(2, 2, 2) if odd else None

    def forward(self, x, t):
        emb = torch.cos(t[:, None] * torch.arange(1, 9) / 50)
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, emb=emb)
        return self.head(torch.relu(h))


INPUTS = (torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12.0))
QUICK = {"iters": 2, "iters_a": 2, "iters_tune": 2, "batch_size": 4}
