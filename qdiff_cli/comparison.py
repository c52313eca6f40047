"""Networks against full precision from the same noises: errors along the trajectory, images, cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.evaluation.cost import Cost, measure_cost
from qdiff.evaluation.lite0 import load_lite0
from qdiff.evaluation.similarity import ImageSimilarity, image_similarity
from qdiff.evaluation.trajectory import StepErrors, Trajectories
from qdiff.utils.extras import require_extra
from qdiff.utils.files import atomic_write
from qdiff.utils.memory import working_memory
from qdiff_cli.images import make_grid
from qdiff_cli.sampling_run import SamplingRun

FULL = "full precision"


@dataclass(frozen=True)
class Comparison:
    """Networks against full precision, by the networks' names.

    Attributes:
        eps: errors of eps on the full-precision trajectory.
        x: errors of x_t on each network's own trajectory.
        similarity: of the images to those of full precision.
        images: uint8 [N, 3, H, W]; full precision is among them.
        seconds: wall time of an image.
        memory: bytes at the peak of sampling a batch, above those held before; None: not measured on this device.
    """

    eps: dict[str, StepErrors]
    x: dict[str, StepErrors]
    similarity: dict[str, ImageSimilarity]
    images: dict[str, Tensor]
    seconds: dict[str, float]
    memory: dict[str, int | None]


def compare(run: SamplingRun, model: nn.Module, networks: Mapping[str, nn.Module], count: int) -> Comparison:
    """Sample `count` images with each network, in batches of the run's size.

    Args:
        run: the sampling run.
        model: the full-precision network.
        networks: quantized networks by name.
        count: images of each network.
    """
    require_extra("eval", "torchmetrics")
    lite0 = load_lite0()  # first, because it may be missing
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
    memory = {name: max(found, default=None) for name, found in peaks.items()}
    return Comparison(trajectories.eps_errors(), trajectories.x_errors(), similarity, joined, seconds, memory)


def costs(run: SamplingRun, networks: Mapping[str, nn.Module]) -> dict[str, Cost]:
    """The cost of each simulated network, and of full precision, for one image."""
    inputs: list[tuple[Tensor, ...]] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not inputs:
            inputs.append(args)

    with torch.no_grad():
        first = next(iter(networks.values()))
        hook = first.register_forward_pre_hook(remember)
        x = torch.zeros(1, *run.task.input_shape, device=run.device)
        run.denoiser(first, range(1))(x, torch.zeros(1, device=run.device))
        hook.remove()
    one = tuple(part[:1] for part in inputs[0])
    quantized = {name: measure_cost(network, one) for name, network in networks.items()}
    return {FULL: measure_cost(first, one, 32, 32)} | quantized


def label_rows(grids: Mapping[str, Tensor]) -> Image.Image:
    """Grids below one another, each with its name above it."""
    width, height = next(iter(grids.values())).shape[2], next(iter(grids.values())).shape[1]
    font, line = ImageFont.load_default(size=15), 22
    picture = Image.new("RGB", (width, len(grids) * (height + line)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, grid) in enumerate(grids.items()):
        draw.text((4, i * (height + line) + 2), name, fill="black", font=font)
        picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, i * (height + line) + line))
    return picture


def save_rows(path: Path, images: Mapping[str, Tensor], count: int = 16) -> None:
    """The first `count` images of each network, one row each."""
    scale = 1 if next(iter(images.values())).shape[2] > 32 else 2
    grids = {
        name: make_grid(batch[:count], columns=min(count, len(batch)), scale=scale) for name, batch in images.items()
    }
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        label_rows(grids).save(file, format="PNG")
