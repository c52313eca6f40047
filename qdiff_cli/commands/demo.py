"""The main job on the bundled models: the same noises in full precision and quantized, one picture and table per family."""

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.checkpoint import PackedInfo, load_packed, read_packed_info, save_packed, state_hash
from qdiff.config import CalibrationConfig
from qdiff.engines.select import apply_engine
from qdiff.evaluation.similarity import psnr, ssim
from qdiff.evaluation.trajectory import Trajectories
from qdiff.utils.files import check_writable
from qdiff_cli.bundled import BundledModel, load_bundled
from qdiff_cli.comparison import FULL, save_rows
from qdiff_cli.options import Parser, add_device_options, positive, select_device
from qdiff_cli.running import log_to, setup_threads

NEAREST = "W4A8 nearest"
RECIPE = CalibrationConfig(steps=10, samples=8)
ERROR_IMAGES = 4  # that the error along the trajectory is measured on
COSTS = {
    "emoji64": 1,
    "emoji32": 2,
    "emoji64-text": 4,
}  # of an image, relative to one another; the first picture comes soonest
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
NETWORKS = (FULL, "W8A8", "W4A8", NEAREST)


def nearest_rounding(show: BundledModel, file: Path) -> nn.Module:
    """The baseline in the number formats of the calibrated file, from a calibration set drawn here."""
    quant = read_packed_info(show.folder / "w4a8.safetensors").config.linear()
    network = show.nearest(quant, RECIPE)
    task = show.job.task
    save_packed(
        file,
        network,
        PackedInfo(task.family.name, task.build, quant, RECIPE.to_dict(), state_hash(show.model.state_dict())),
    )
    return network


class Demo:
    """One model: a row of images for each network, each row added to the picture as soon as it is sampled."""

    def __init__(self, show: BundledModel, output: Path, progress: tqdm) -> None:
        self.show, self.progress = show, progress
        name = show.name
        self.picture = output / f"demo_{name}.png"
        self.files = {FULL: show.folder / "unet.safetensors", "W8A8": show.folder / "w8a8.safetensors"}
        self.files |= {"W4A8": show.folder / "w4a8.safetensors", NEAREST: output / f"{name}_w4a8_nearest.safetensors"}
        self.images: dict[str, Tensor] = {}
        self.states: list[tuple[Tensor, Tensor, Tensor]] = []  # (x_t, t, eps) of the first images in full precision

    def network(self, name: str) -> nn.Module:
        if name == FULL:
            return self.show.model
        network = (
            nearest_rounding(self.show, self.files[NEAREST]) if name == NEAREST else load_packed(self.files[name])[0]
        )
        return apply_engine(network.to(self.show.job.device))

    def counted(self, keep: bool) -> Callable[[Tensor, Tensor, Tensor], None]:
        """A callback of the sampler that moves the progress bar; with `keep` the trajectory is remembered."""
        share = COSTS[self.show.name] * self.show.job.total / self.show.job.task.evaluations

        def callback(x: Tensor, t: Tensor, eps: Tensor) -> None:
            self.progress.update(share)
            if keep:
                self.states.append((x[:ERROR_IMAGES], t[:ERROR_IMAGES], eps[:ERROR_IMAGES]))

        return callback

    @torch.no_grad()
    def eps_error(self, network: nn.Module) -> float:
        """Mean relative error of eps along the full-precision trajectory of the first images."""
        errors = Trajectories()
        watch = errors.watch({"it": self.show.job.denoiser(network, range(min(ERROR_IMAGES, self.show.job.total)))})
        for x, t, eps in self.states:
            watch(x, t, eps)
        return errors.eps_errors()["it"].mean

    def line(self, name: str) -> str:
        """Sample the row of a network, write the picture; the line of the table."""
        network, job = self.network(name), self.show.job
        began = perf_counter()
        self.images[name] = job.sample(network, range(job.total), self.counted(keep=name == FULL))
        seconds = (perf_counter() - began) / job.total
        save_rows(self.picture, self.images)
        size = self.files[name].stat().st_size / 1e6
        if name == FULL:
            return f"{name:14} {size:8.2f} {'':8} {'':7} {'':10} {seconds:8.2f}   (stored in half precision)"
        close = psnr(self.images[name], self.images[FULL]), ssim(self.images[name], self.images[FULL])
        return f"{name:14} {size:8.2f} {close[0]:8.1f} {close[1]:7.3f} {self.eps_error(network):10.4f} {seconds:8.2f}"

    def run(self) -> None:
        job = self.show.job
        self.progress.set_description(self.show.name)
        self.progress.write(
            f"\n{job.title}\n{'':14} {'file MB':>8} {'PSNR dB':>8} {'SSIM':>7} {'eps error':>10} {'s/image':>8}"
        )
        for name in NETWORKS:
            self.progress.write(self.line(name))
        self.progress.write(f"{self.picture}: one row for each line of the table, the same {job.total} noises")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--images", type=positive, default=16)
    add_device_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    device = select_device(args.device)
    check_writable(args.output / "demo_emoji32.png")
    log_to(None, verbose=False)
    shows = [load_bundled(name, args.images, device) for name in COSTS]
    total = sum(COSTS[show.name] * show.job.total * len(NETWORKS) for show in shows)
    with tqdm(total=total, bar_format=BAR) as progress:
        for show in shows:
            Demo(show, args.output, progress).run()
