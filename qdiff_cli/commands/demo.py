"""The main job on the bundled models: the same noises in full precision and quantized, with pictures and tables."""

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
from qdiff.evaluation.similarity import psnr, ssim
from qdiff.evaluation.trajectory import Trajectories
from qdiff.utils.files import check_writable
from qdiff_cli.bundled import folder_of, sampling_command
from qdiff_cli.comparison import FULL, save_rows
from qdiff_cli.options import DeviceOptions, Parser, add_device_options, positive
from qdiff_cli.runs import log_to

NEAREST = "W4A8 nearest"
RECIPE = CalibrationConfig(num_timesteps=10, samples=8)
ERROR_IMAGES = 4  # that the error along the trajectory is measured on
COSTS = {"emoji64": 1, "emoji32": 2, "emoji64-text": 4}  # relative, of an image; the cheapest model comes first
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
NETWORKS = (FULL, "W8A8", "W4A8", NEAREST)


@dataclass(frozen=True)
class DemoOptions:
    """The options of demo.py.

    Attributes:
        output: the folder to write.
        images: images of each network.
        device: where the networks work.
    """

    output: Path
    images: int
    device: DeviceOptions


def parse(argv: Sequence[str] | None) -> DemoOptions:
    """The options of these words."""
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--images", type=positive, default=16)
    add_device_options(parser)
    args = parser.parse_args(argv)
    return DemoOptions(args.output, args.images, args.make(DeviceOptions))


class Demo:
    """One model: a row of images for each network. A row joins the picture as soon as it is sampled.

    Args:
        name: the bundled model.
        options: the options of demo.py.
        progress: the progress bar of all models.
    """

    def __init__(self, name: str, options: DemoOptions, progress: tqdm) -> None:
        self.name, self.progress = name, progress
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
        """The cost of the whole model, in units of the progress bar."""
        return COSTS[self.name] * self.run.total * len(NETWORKS)

    def network(self, name: str) -> nn.Module:
        """One of `NETWORKS`, on its engine."""
        if name == FULL:
            return self.model
        network = self.nearest_rounding() if name == NEAREST else PackedFile.open(self.files[name]).network()
        return apply_engine(network.to(self.run.device))

    def nearest_rounding(self) -> nn.Module:
        """The baseline in the number formats of the calibrated file, on a calibration set drawn here."""
        quant = PackedFile.open(self.files["W4A8"]).info.config.linear()
        task = self.run.task
        data = task.make_calibration_set(self.model, RECIPE).select(RECIPE.num_timesteps, RECIPE.samples)
        network = Calibration(self.model, task.architecture, quant, RECIPE, data).nearest()
        source = state_hash(self.model.state_dict())
        info = PackedInfo(task.architecture.name, task.unet_config, quant, RECIPE.to_dict(), source)
        save_packed(self.files[NEAREST], network, info)
        return network

    def callback(self, remember: bool) -> Callable[[Tensor, Tensor, Tensor], None]:
        """A callback of the sampler that moves the progress bar; with `remember` it keeps the trajectory."""
        share = COSTS[self.name] * self.run.total / self.run.task.evaluations

        def on_evaluation(x: Tensor, t: Tensor, eps: Tensor) -> None:
            self.progress.update(share)
            if remember:
                self.states.append((x[:ERROR_IMAGES], t[:ERROR_IMAGES], eps[:ERROR_IMAGES]))

        return on_evaluation

    @torch.no_grad()
    def eps_error(self, network: nn.Module) -> float:
        """Mean relative error of eps along the full-precision trajectory of the first images."""
        errors = Trajectories()
        watch = errors.watch({"it": self.run.denoiser(network, range(min(ERROR_IMAGES, self.run.total)))})
        for x, t, eps in self.states:
            watch(x, t, eps)
        return errors.eps_errors()["it"].mean

    def line(self, name: str) -> str:
        """Sample the row of a network and write the picture; the line of the table."""
        network, total = self.network(name), self.run.total
        began = perf_counter()
        self.images[name] = self.run.sample(network, range(total), self.callback(remember=name == FULL))
        seconds = (perf_counter() - began) / total
        save_rows(self.picture, self.images)
        size = self.files[name].stat().st_size / 1e6
        if name == FULL:
            return f"{name:14} {size:8.2f} {'':8} {'':7} {'':10} {seconds:8.2f}   (stored in half precision)"
        found, reference = self.images[name], self.images[FULL]
        likeness = f"{psnr(found, reference):8.1f} {ssim(found, reference):7.3f}"
        return f"{name:14} {size:8.2f} {likeness} {self.eps_error(network):10.4f} {seconds:8.2f}"

    def show(self) -> None:
        """Sample all networks; write the picture and the table."""
        self.progress.set_description(self.name)
        columns = f"{'':14} {'file MB':>8} {'PSNR dB':>8} {'SSIM':>7} {'eps error':>10} {'s/image':>8}"
        self.progress.write(f"\n{self.run.title}\n{columns}")
        for name in NETWORKS:
            self.progress.write(self.line(name))
        self.progress.write(f"{self.picture}: one row for each line of the table, the same {self.run.total} noises")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    check_writable(options.output / "demo_emoji32.png")
    log_to(None, verbose=False)
    with tqdm(total=0, bar_format=BAR) as progress:
        demos = [Demo(name, options, progress) for name in COSTS]
        progress.total = sum(demo.cost for demo in demos)
        for demo in demos:
            demo.show()
