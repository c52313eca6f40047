"""Compares networks with full precision from the same noise samples: errors along the trajectory, images and cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.config import QuantConfig
from qdiff.evaluation.cost import Cost, measure_cost
from qdiff.evaluation.lite0 import load_lite0
from qdiff.evaluation.similarity import ImageSimilarity, image_similarity
from qdiff.evaluation.trajectory import StepErrors, Trajectories
from qdiff.model import quantize_model
from qdiff.utils.extras import require_extra
from qdiff.utils.files import atomic_write
from qdiff.utils.memory import working_memory
from qdiff_cli.images import make_grid
from qdiff_cli.sampling_run import SamplingRun

FULL = "full precision"

# The heading and the number format of each measure of closeness to full precision, in every table that has it.
CLOSENESS = {
    "trajectory_error": ("eps error", "{:.4f}"),
    "psnr": ("PSNR dB", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "isolated": ("isolated px", "{:.0f}"),
    "identity": ("identity", "{:.0%}"),
    "perceptual": ("perceptual (lite0)", "{:.3f}"),
}


@dataclass(frozen=True)
class Comparison:
    """The comparison of networks with full precision. Every attribute is a dict by the name of the network.

    Attributes:
        eps: errors of eps on the full-precision trajectory.
        x: errors of x_t on the trajectory of each network itself.
        similarity: the similarity of the images to the full-precision ones.
        images: uint8 images [N, 3, H, W]; the dict has an entry for full precision too.
        seconds: wall time of an image.
        memory: peak memory while a batch is sampled, in bytes above the memory before it; None: this device does not
            measure it.
    """

    eps: dict[str, StepErrors]
    x: dict[str, StepErrors]
    similarity: dict[str, ImageSimilarity]
    images: dict[str, Tensor]
    seconds: dict[str, float]
    memory: dict[str, int | None]


def closeness_header(*names: str) -> list[str]:
    """The headings of some measures of `CLOSENESS`."""
    return [CLOSENESS[name][0] for name in names]


def closeness_cells(similarity: ImageSimilarity, *names: str) -> list[str]:
    """Some measures of `CLOSENESS` that images have, as text."""
    return [CLOSENESS[name][1].format(getattr(similarity, name)) for name in names]


def compare(run: SamplingRun, model: nn.Module, networks: Mapping[str, nn.Module], count: int) -> Comparison:
    """Sample images with each network, and compare them with full precision.

    Args:
        run: the sampling run, which has the batch size.
        model: the full-precision network.
        networks: quantized networks by name.
        count: the number of images of each network.
    """
    require_extra("eval", "torchmetrics")
    lite0 = load_lite0()  # before the sampling, because it may be missing
    trajectories = Trajectories()
    images: dict[str, list[Tensor]] = {name: [] for name in (FULL, *networks)}
    seconds = dict.fromkeys(images, 0.0)
    peaks: dict[str, list[int]] = {name: [] for name in images}
    with tqdm(total=count * len(images), desc="comparison", unit="image") as progress:
        for batch in run.batches(count):
            denoisers = {name: run.denoiser(network, batch) for name, network in networks.items()}
            run.sample(model, batch, trajectories.watch(denoisers))
            for name, network in ((FULL, model), *networks.items()):
                callback = None if name == FULL else trajectories.follow(name)
                started = perf_counter()
                with working_memory(run.device, peaks[name]):
                    images[name].append(run.sample(network, batch, callback))
                seconds[name] += (perf_counter() - started) / count
                progress.update(len(batch))
    joined = {name: torch.cat(parts) for name, parts in images.items()}
    similarity = {
        name: image_similarity(zip(joined[name].split(16), joined[FULL].split(16), strict=True), lite0)
        for name in networks
    }
    memory = {name: max(values, default=None) for name, values in peaks.items()}
    return Comparison(trajectories.eps_errors(), trajectories.x_errors(), similarity, joined, seconds, memory)


def measure_costs(run: SamplingRun, model: nn.Module, networks: Mapping[str, nn.Module]) -> dict[str, Cost]:
    """Measure the cost of one evaluation on one sample.

    Args:
        run: the sampling run.
        model: the full-precision network.
        networks: simulated networks by name.
    """
    inputs: list[tuple[Tensor, ...]] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not inputs:
            inputs.append(args)

    with torch.no_grad():
        wrapped = quantize_model(model, run.task.architecture, QuantConfig())
        hook = wrapped.register_forward_pre_hook(remember)
        x = torch.zeros(1, *run.task.input_shape, device=run.device)
        run.denoiser(wrapped, range(1))(x, torch.zeros(1, device=run.device))
        hook.remove()
    sample = tuple(part[:1] for part in inputs[0])  # guidance gives the network two samples for an image
    quantized = {name: measure_cost(network, sample) for name, network in networks.items()}
    return {FULL: measure_cost(wrapped, sample, 32, 32)} | quantized


def stack_labeled_grids(grids: Mapping[str, Tensor]) -> Image.Image:
    """Arrange grids below one another, each with its name above it."""
    width, height = next(iter(grids.values())).shape[2], next(iter(grids.values())).shape[1]
    font, label_height = ImageFont.load_default(size=15), 22
    picture = Image.new("RGB", (width, len(grids) * (height + label_height)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, grid) in enumerate(grids.items()):
        top = i * (height + label_height)
        draw.text((4, top + 2), name, fill="black", font=font)
        picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, top + label_height))
    return picture


def save_image_rows(path: Path, images: Mapping[str, Tensor], count: int = 16) -> None:
    """Write a picture with a row for each network, of its first `count` images."""
    scale = 1 if next(iter(images.values())).shape[2] > 32 else 2
    grids = {
        name: make_grid(batch[:count], columns=min(count, len(batch)), scale=scale) for name, batch in images.items()
    }
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        stack_labeled_grids(grids).save(file, format="PNG")
