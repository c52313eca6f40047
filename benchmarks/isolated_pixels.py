"""Isolated wrong pixels of a bundled model, beside those of disturbances that are smaller than 8-bit quantization.

    python benchmarks/isolated_pixels.py
    python benchmarks/isolated_pixels.py --model emoji64 --files w8a8.safetensors

It samples from the same noise samples as full precision with

- full precision computed in bfloat16 (autocast);
- full precision whose output gets white noise of a relative size of 0.001 and of 0.01;
- packed files, without quantized activations and with them.

One row compares full-precision images with those of other noise samples: what a picture that becomes another one
brings. Each row has the isolated wrong pixels of all images, of the images that keep their identity, and of the worst
image, and the number of images that have any (docs/evaluation.md). Rows are printed as they come.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.checkpoint import load_packed
from qdiff.evaluation.page import markdown_table
from qdiff.evaluation.similarity import isolated_pixels, keeps_identity
from qdiff.model import enable_activations
from qdiff_cli.bundled import NAMES, folder_of, sampling_command
from qdiff_cli.sampling_run import SamplingRun

HEADER = ["network", "isolated px", "in images that keep their identity", "images with any", "worst image", "identity"]


class InBfloat16(nn.Module):
    """A network that computes in bfloat16 where autocast does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(*inputs).float()


class WithNoise(nn.Module):
    """A network whose output gets white noise.

    Args:
        network: the network.
        size: the norm of the noise relative to that of the output of each sample.
    """

    def __init__(self, network: nn.Module, size: float) -> None:
        super().__init__()
        self.network, self.size, self.generator = network, size, torch.Generator().manual_seed(0)

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.network(*inputs)
        noise = torch.randn(output.shape, generator=self.generator)
        dims = tuple(range(1, output.ndim))
        return output + self.size * output.square().mean(dims, keepdim=True).sqrt() * noise


def packed_networks(files: list[Path]) -> dict[str, nn.Module]:
    """The networks of packed files, by name, each without quantized activations and with them."""
    networks = {}
    for file in files:
        for activations in (True, False):
            network, _ = load_packed(file)
            enable_activations(network, activations)
            networks[f"{file.stem}{'' if activations else ', activations in float'}"] = network
    return networks


@torch.no_grad()
def sample(run: SamplingRun, network: nn.Module) -> Tensor:
    """All images of the run, uint8 [N, 3, H, W]."""
    return torch.cat([run.sample(network, batch) for batch in run.batches(run.total)])


def row(name: str, images: Tensor, reference: Tensor) -> list[str]:
    """A row of the table, for uint8 images [N, 3, H, W] and their references."""
    counts, kept = isolated_pixels(images, reference), keeps_identity(images, reference)
    worst = int(counts.argmax())
    found = f"{int(counts[worst])} (image {worst})" if counts[worst] else "0"
    numbers = [str(int(number)) for number in (counts.sum(), counts[kept].sum(), (counts > 0).sum())]
    return [name, *numbers, found, f"{kept.float().mean().item():.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default=NAMES[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--files", type=Path, nargs="+", help="packed files; those of the bundled model if not given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = sampling_command(args.model, args.images).on("cpu", args.threads).make_run()
    model = run.load_full_precision().requires_grad_(False)
    networks = {"bfloat16": InBfloat16(model)}
    networks |= {f"output with noise of {size}": WithNoise(model, size) for size in (0.001, 0.01)}
    files = args.files or [folder_of(args.model) / f"{widths}.safetensors" for widths in ("w8a8", "w4a8")]
    networks |= packed_networks(files)
    reference = sample(run, model)
    rows = [row("other noise samples", reference.roll(1, 0), reference)]
    for name, network in networks.items():
        rows.append(row(name, sample(run, network), reference))
        print(rows[-1], flush=True)
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
