"""Training of the bundled latent models: the loss of the autoencoder, and the text model with its captions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddim.config import TrainingConfig
from ddim.training import Loss
from ldm.autoencoder import AutoencoderKL
from ldm.encoders import FrozenCLIPEmbedder

KL_WEIGHT = 1e-4  # weight of the divergence per latent element, relative to the mean absolute error of the pixels
EDGE_WEIGHT = 1.0  # weight of the error of horizontal and vertical differences, which keeps outlines sharp


class Reconstruction(nn.Module):
    """An autoencoder as one network, which encodes images, samples the posterior and decodes the sample."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct a batch.

        Args:
            images: [N, 3, H, W], in [-1, 1].
            noise: standard normal, [N, C, h, w].

        Returns:
            The reconstruction, and the mean and standard deviation of the posterior.
        """
        mean, std = self.autoencoder.posterior(images)
        return self.autoencoder.decode(mean + std * noise), mean, std


def autoencoder_loss(images: Tensor, latent_shape: tuple[int, ...], config: TrainingConfig) -> Loss:
    """Make the loss of an autoencoder: absolute errors, and the divergence of the posterior from N(0, 1).

    The absolute errors are those of the pixels and of the differences between neighboring pixels.

    Args:
        images: the training data, [N, 3, H, W], in [-1, 1].
        latent_shape: (C, h, w) of the latents.
        config: the batch size.
    """

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
    """Return the posterior means of all images [N, 3, H, W], in batches, as [N, C, h, w]."""
    return torch.cat([autoencoder.encode(batch) for batch in images.split(batch_size)])


class TextModel(nn.Module):
    """A UNet and a text tower as one network."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Predict the noise in `z` [N, C, h, w] at time steps `t` [N] given `tokens` [N, L]."""
        return self.unet(z, t, self.text(tokens))


class RandomCaptions:
    """Chooses a random caption for each image of a batch, or the empty prompt, which guidance needs.

    Args:
        embedder: the text tower with its tokenizer.
        captions: the captions of each image of the training data.
        drop: probability of the empty prompt.
    """

    def __init__(self, embedder: FrozenCLIPEmbedder, captions: list[list[str]], drop: float = 0.1) -> None:
        self.tokens = [embedder.tokenize(texts) for texts in captions]
        self.empty, self.drop = embedder.tokenize([""])[0], drop

    def __call__(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor]:
        """Return the tokens [N, L] of the images `index` [N], as the further arguments of a `TextModel`."""
        numbers = torch.rand(len(index), 2, generator=generator).tolist()
        tokens = []
        for i, (position, drop) in zip(index.tolist(), numbers, strict=True):
            choices = self.tokens[i]
            tokens.append(self.empty if drop < self.drop else choices[int(position * len(choices))])
        return (torch.stack(tokens),)
