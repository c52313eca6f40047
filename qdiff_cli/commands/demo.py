"""Sample the bundled models from the same noise samples in full precision and quantized, with pictures and tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.calibration.run import Calibration
from qdiff.checkpoint import PackedFile, PackedInfo, save_packed, state_hash
from qdiff.config import CalibrationConfig
from qdiff.engines.select import apply_engine
from qdiff.evaluation.similarity import SIMILARITY_DEFINITION, image_similarity
from qdiff.evaluation.trajectory import Trajectories
from qdiff.utils.files import check_writable
from qdiff_cli.bundled import folder_of, sampling_command
from qdiff_cli.comparison import CLOSENESS, FULL, closeness_cells, closeness_header, save_image_rows
from qdiff_cli.options import DeviceOptions, Parser, add_device_options, positive
from qdiff_cli.runs import log_to
from qdiff_cli.widths import own_widths

NEAREST = "W4A8 nearest"
RECIPE = CalibrationConfig(num_timesteps=10, samples=8)
ERROR_IMAGES = 4  # the number of images for the error along the trajectory
COSTS = {"emoji64": 1, "emoji32": 2, "emoji64-text": 4}  # relative time of an image; the fastest model comes first
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
NETWORKS = (FULL, "W8A8", "W4A8", NEAREST)
SIMILARITY = ("psnr", "ssim", "isolated", "identity")
LINE = "{:14} {:>8} {:>8} {:>7} {:>11} {:>8} {:>10} {:>8}"  # of the table


@dataclass(frozen=True)
class DemoOptions:
    """The options of demo.py.

    Attributes:
        output: the folder of the pictures.
        images: the number of images of each network.
        device: the device of the networks.
    """

    output: Path
    images: int
    device: DeviceOptions


def parse(argv: Sequence[str] | None) -> DemoOptions:
    """Parse the arguments of the command; None: those of this process."""
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the pictures")
    parser.add_argument("--images", type=positive, default=16, help="images of each network")
    add_device_options(parser)
    args = parser.parse_args(argv)
    return DemoOptions(args.output, args.images, args.make(DeviceOptions))


class Demo:
    """Samples a row of images with each network of a model. The picture shows a row as soon as it is sampled.

    Args:
        name: the bundled model.
        options: the options of demo.py.
    """

    def __init__(self, name: str, options: DemoOptions) -> None:
        self.name = name
        self.progress = tqdm(disable=True)  # `sample_all` gets the one that is shown
        command = sampling_command(name, options.images)
        self.run = command.on(options.device.device, options.device.threads).make_run()
        self.model = self.run.load_full_precision()
        folder, output = folder_of(name), options.output
        self.picture = output / f"demo_{name}.png"
        self.files = {FULL: folder / "unet.safetensors", "W8A8": folder / "w8a8.safetensors"}
        self.files |= {"W4A8": folder / "w4a8.safetensors", NEAREST: output / f"{name}_w4a8_nearest.safetensors"}
        self.images: dict[str, Tensor] = {}
        self.states: list[tuple[Tensor, Tensor, Tensor]] = []  # (x_t, t, eps) of the first images in full precision

    @property
    def cost(self) -> int:
        """The time for all images of the model, in units of the progress bar."""
        return COSTS[self.name] * self.run.total * len(NETWORKS)

    def network(self, name: str) -> nn.Module:
        """One of `NETWORKS`, with the fastest engine applied."""
        if name == FULL:
            return self.model
        network = self.calibrate_nearest() if name == NEAREST else PackedFile.open(self.files[name]).network()
        return apply_engine(network.to(self.run.device))

    def calibrate_nearest(self) -> nn.Module:
        """Nearest rounding in the number formats of the calibrated file, with a calibration set that is generated."""
        quant = PackedFile.open(self.files["W4A8"]).info.config.linear()
        task = self.run.task
        data = task.make_calibration_set(self.model, RECIPE).select(RECIPE.num_timesteps, RECIPE.samples)
        network = Calibration(self.model, task.architecture, quant, RECIPE, data).run()
        source = state_hash(self.model.state_dict())
        info = PackedInfo(task.architecture.name, task.unet_config, quant, RECIPE.to_dict(), source)
        save_packed(self.files[NEAREST], network, info)
        return network

    def callback(self, remember: bool) -> Callable[[Tensor, Tensor, Tensor], None]:
        """A callback of the sampler that moves the progress bar. With `remember` it stores the trajectory."""
        share = COSTS[self.name] * self.run.total / self.run.task.evaluations

        def on_evaluation(x: Tensor, t: Tensor, eps: Tensor) -> None:
            self.progress.update(share)
            if remember:
                self.states.append((x[:ERROR_IMAGES], t[:ERROR_IMAGES], eps[:ERROR_IMAGES]))

        return on_evaluation

    @torch.no_grad()
    def eps_error(self, network: nn.Module) -> float:
        """The mean relative error of eps along the full-precision trajectory of the first images."""
        errors = Trajectories()
        watch = errors.watch({"network": self.run.denoiser(network, range(min(ERROR_IMAGES, self.run.total)))})
        for x, t, eps in self.states:
            watch(x, t, eps)
        return errors.eps_errors()["network"].mean

    def sample_row(self, name: str) -> str:
        """Sample the images of a network, and write the picture. Returns the line of the table."""
        network, total = self.network(name), self.run.total
        started = perf_counter()
        self.images[name] = self.run.sample(network, range(total), self.callback(remember=name == FULL))
        seconds = (perf_counter() - started) / total
        save_image_rows(self.picture, self.images)
        size = self.files[name].stat().st_size / 1e6
        start, end = (name, f"{size:.2f}"), f"{seconds:.2f}"
        if name == FULL:
            return LINE.format(*start, *[""] * (len(SIMILARITY) + 1), end) + "   (stored in half precision)"
        similarity = image_similarity([(self.images[name], self.images[FULL])])
        error = CLOSENESS["trajectory_error"][1].format(self.eps_error(network))
        return LINE.format(*start, *closeness_cells(similarity, *SIMILARITY), error, end)

    def sample_all(self, progress: tqdm) -> None:
        """Sample the images of all networks, and print the table."""
        self.progress = progress
        self.progress.set_description(self.name)
        columns = LINE.format("", "file MB", *closeness_header(*SIMILARITY, "trajectory_error"), "s/image")
        self.progress.write(f"\n{self.run.title}\n{columns}")
        for name in NETWORKS:
            self.progress.write(self.sample_row(name))
        for name in ("W8A8", "W4A8"):
            if own := own_widths(PackedFile.open(self.files[name]).info.config, self.run.task):
                self.progress.write(f"{name}: {own}")
        row = f"one row for each line of the table, {self.run.total} images from the same noise samples"
        self.progress.write(f"{self.picture}: {row}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    options.device.apply()  # a device that is not there is an error now
    check_writable(options.output / "demo_emoji32.png")
    log_to(None, verbose=False)
    demos = [Demo(name, options) for name in COSTS]
    with tqdm(total=sum(demo.cost for demo in demos), bar_format=BAR) as progress:
        for demo in demos:
            demo.sample_all(progress)
    print(f"\n{SIMILARITY_DEFINITION}")
