"""The main job on the embedded models: the same noises in full precision and quantized, one picture and table per family."""

import argparse
from pathlib import Path

import torch
from torch import nn

from qdiff.checkpoint import PackedInfo, load_packed, read_packed_info, save_packed, state_hash
from qdiff.config import CalibrationConfig
from qdiff.integer import prepare as choose_engine
from qdiff_cli.comparison import FULL, compare, save_rows
from qdiff_cli.embedded import NAMES, Embedded, load_embedded
from qdiff_cli.options import Parser, add_device_options, positive, select_device
from qdiff_cli.running import log_to, setup_threads

NEAREST = "W4A8 nearest"
RECIPE = CalibrationConfig(steps=10, samples=16)


def nearest_rounding(show: Embedded, file: Path) -> nn.Module:
    """The baseline in the number formats of the calibrated file, from a calibration set drawn here."""
    quant = read_packed_info(show.folder / "w4a8.safetensors").config.linear()
    network = show.nearest(quant, RECIPE)
    task = show.job.task
    save_packed(file, network, PackedInfo(task.family.name, task.build, quant, RECIPE.to_dict(), state_hash(show.model.state_dict())))
    return network


def run(show: Embedded, output: Path, device: torch.device) -> None:
    files = {FULL: show.folder / "unet.safetensors", "W8A8": show.folder / "w8a8.safetensors", "W4A8": show.folder / "w4a8.safetensors"}
    networks = {name: load_packed(file)[0].to(device) for name, file in files.items() if name != FULL}
    files[NEAREST] = output / f"{show.folder.name}_w4a8_nearest.safetensors"
    networks[NEAREST] = nearest_rounding(show, files[NEAREST])
    networks = {name: choose_engine(network) for name, network in networks.items()}
    found = compare(show.job, show.model, networks, show.job.total)

    print(f"\n{show.job.title}\n{'':14} {'file MB':>8} {'PSNR dB':>8} {'SSIM':>7} {'eps error':>10} {'s/image':>8}")
    for name, file in files.items():
        size, seconds = file.stat().st_size / 1e6, found.seconds[name]
        if name == FULL:
            print(f"{name:14} {size:8.2f} {'':8} {'':7} {'':10} {seconds:8.2f}   (stored in half precision)")
            continue
        close = found.likeness[name]
        print(f"{name:14} {size:8.2f} {close.psnr:8.1f} {close.ssim:7.3f} {found.eps[name].mean:10.4f} {seconds:8.2f}")
    picture = output / f"demo_{show.folder.name}.png"
    save_rows(picture, found.images)
    print(f"{picture}: one row for each line of the table, the same {show.job.total} noises", flush=True)


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
