"""The main job on the embedded models: the same noises in full precision and quantized, one picture and table per family.

    python scripts/demo.py --output demo_output

Writes demo_<model>.png for each embedded model and prints tables: file size, PSNR and SSIM of
the images against full precision, relative error of eps averaged over the trajectory, seconds per image.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from common.embedded import NAMES, Embedded, load_embedded
from common.images import make_grid
from common.options import Parser, add_device_options, positive, run_main, select_device
from common.running import log_to, setup_threads
from qdiff.analysis import psnr, ssim, trajectory_errors
from qdiff.checkpoint import PackedInfo, load_packed, read_packed_info, save_packed, state_hash
from qdiff.config import CalibrationConfig
from qdiff.files import atomic_write

FULL, NEAREST = "full precision", "W4A8 nearest"
RECIPE = CalibrationConfig(steps=10, samples=16)


def nearest_rounding(show: Embedded, file: Path) -> nn.Module:
    """The baseline in the number formats of the calibrated file, from a calibration set drawn here."""
    quant = read_packed_info(show.folder / "w4a8.safetensors").config.linear()
    network = show.nearest(quant, RECIPE)
    task = show.job.task
    save_packed(file, network, PackedInfo(task.family.name, task.build, quant, RECIPE.to_dict(), state_hash(show.model.state_dict())))
    return network


def label_rows(grids: dict[str, Tensor]) -> Image.Image:
    """The grids below one another, each with its name above it."""
    width, height = next(iter(grids.values())).shape[2], next(iter(grids.values())).shape[1]
    font, line = ImageFont.load_default(size=15), 22
    picture = Image.new("RGB", (width, len(grids) * (height + line)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, grid) in enumerate(grids.items()):
        draw.text((4, i * (height + line) + 2), name, fill="black", font=font)
        picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, i * (height + line) + line))
    return picture


def run(show: Embedded, output: Path, device: torch.device) -> None:
    files = {FULL: show.folder / "unet.safetensors", "W8A8": show.folder / "w8a8.safetensors", "W4A8": show.folder / "w4a8.safetensors"}
    networks = {FULL: show.model} | {name: load_packed(file)[0].to(device) for name, file in files.items() if name != FULL}
    files[NEAREST] = output / f"{show.folder.name}_w4a8_nearest.safetensors"
    networks[NEAREST] = nearest_rounding(show, files[NEAREST])
    denoisers = {name: show.denoiser(network) for name, network in networks.items() if name != FULL}
    errors = trajectory_errors(lambda callback: show.sample(show.model, callback), denoisers)
    images, seconds = {}, {}
    for name, network in networks.items():
        start = time.perf_counter()
        images[name] = show.sample(network)
        seconds[name] = (time.perf_counter() - start) / len(images[name])

    print(f"\n{show.job.title}\n{'':14} {'file MB':>8} {'PSNR dB':>8} {'SSIM':>7} {'eps error':>10} {'s/image':>8}")
    for name in networks:
        size = files[name].stat().st_size / 1e6
        if name == FULL:
            print(f"{name:14} {size:8.2f} {'':8} {'':7} {'':10} {seconds[name]:8.2f}   (stored in half precision)")
            continue
        quality = f"{psnr(images[name], images[FULL]):8.1f} {ssim(images[name], images[FULL]):7.3f} {errors[name].mean:10.4f}"
        print(f"{name:14} {size:8.2f} {quality} {seconds[name]:8.2f}")
    count, scale = len(images[FULL]), 1 if images[FULL].shape[2] > 32 else 2
    picture = f"demo_{show.folder.name}.png"
    with atomic_write(output / picture) as temporary, temporary.open("wb") as file:
        label_rows({name: make_grid(batch, columns=count, scale=scale) for name, batch in images.items()}).save(file, format="PNG")
    print(f"{output / picture}: one row for each line of the table, the same {count} noises", flush=True)


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
    args.output.mkdir(parents=True, exist_ok=True)
    log_to(None, verbose=False)
    for name in NAMES:
        run(load_embedded(name, args.images, device), args.output, device)


if __name__ == "__main__":
    run_main(main)
