"""Losses that train the bundled latent models: the autoencoder's and, with captions, the text model's."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.config import TrainingConfig
from ddim.training import Loss
from ldm.autoencoder import AutoencoderKL
from ldm.encoders import FrozenCLIPEmbedder

KL_WEIGHT = 1e-4  # per latent element, beside a mean absolute error of the pixels
EDGE_WEIGHT = 1.0  # of the error of horizontal and vertical differences: keeps outlines sharp


class Reconstruction(nn.Module):
    """The autoencoder as one call: a sample of the posterior, decoded, with mean and standard deviation."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = self.autoencoder.posterior(images)
        return self.autoencoder.decode(mean + std * noise), mean, std


def autoencoder_loss(images: Tensor, latent_shape: tuple[int, ...], config: TrainingConfig) -> Loss:
    """Absolute error of pixels and of their differences, and the divergence of the posterior from N(0, 1)."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(images), (config.batch_size,), generator=generator)
        x = images[index]
        flip = torch.rand(config.batch_size, generator=generator).to(x.device) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(3), x).contiguous(memory_format=torch.channels_last)
        noise = torch.randn((config.batch_size, *latent_shape), generator=generator).to(x.device)
        with torch.autocast(x.device.type, torch.bfloat16):
            output, mean, std = model(x, noise)
        output, mean, std = output.float(), mean.float(), std.float()
        edges = sum(F.l1_loss(output.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.clamp(min=1e-6).log()).mean()
        return F.l1_loss(output, x) + EDGE_WEIGHT * edges + KL_WEIGHT * divergence

    return loss


@torch.no_grad()
def encode_all(autoencoder: AutoencoderKL, images: Tensor, batch_size: int = 64) -> Tensor:
    """Posterior means of all images, [N, C, h, w]."""
    return torch.cat([autoencoder.encode(part) for part in images.split(batch_size)])


class TextModel(nn.Module):
    """UNet and text tower as one network: (z_t, t, tokens [N, L]) to eps."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(z, t, self.text(tokens))


class CaptionDraw:
    """Tokens of a random caption of each drawn image; with probability `drop`, of the empty prompt (for guidance)."""

    def __init__(self, embedder: FrozenCLIPEmbedder, captions: list[list[str]], drop: float = 0.1) -> None:
        self.tokens = [embedder.tokenize(texts) for texts in captions]
        self.empty, self.drop = embedder.tokenize([""])[0], drop

    def __call__(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor]:
        draws = torch.rand(len(index), 2, generator=generator).tolist()
        rows = []
        for i, (which, drop) in zip(index.tolist(), draws, strict=True):
            choices = self.tokens[i]
            rows.append(self.empty if drop < self.drop else choices[int(which * len(choices))])
        return (torch.stack(rows),)
