"""The main job on the embedded pixel model: the same 16 noises in full precision and quantized, as one picture.

    python scripts/demo.py --output demo_output

Writes demo.png and prints a table: file size, PSNR and SSIM of the images against full precision,
relative error of eps averaged over the trajectory, seconds per image.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from common import REPOSITORY
from common.images import make_grid, to_uint8
from common.options import Parser, positive, run_main, select_device
from common.running import log_to, setup_threads
from ddim.config import load_config
from ddim.family import PIXEL, describe
from ddim.sampling import PixelSampler, SamplerSettings, make_calibration_set
from ddim.weights import load_unet
from qdiff.analysis import psnr, ssim, trajectory_errors
from qdiff.calibration.run import calibrate
from qdiff.checkpoint import PackedInfo, load_packed, save_packed, state_hash
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.files import atomic_write

MODEL = REPOSITORY / "models/ddim/emoji32"
NEAREST = QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True, quant_mode="linear")
FULL = "full precision"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--images", type=positive, default=16)
    parser.add_argument("--timesteps", type=positive, default=50)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(argv)


def nearest_rounding(model: nn.Module, sampler: PixelSampler, file: Path) -> nn.Module:
    """The baseline: nearest rounding and min-max ranges, from a calibration set drawn here."""
    config = CalibrationConfig(steps=10, samples=25)
    rows = make_calibration_set(model, sampler, seed=1234, config=config).select(config.steps, config.samples)
    network = calibrate(model, PIXEL, NEAREST, config, rows)
    build = describe(sampler.config.model)
    save_packed(file, network, PackedInfo(PIXEL.name, build, NEAREST, config.to_dict(), state_hash(model.state_dict())))
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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    device = select_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    log_to(None, verbose=False)
    config = load_config(REPOSITORY / "configs/emoji32.yml")
    sampler = PixelSampler(config, SamplerSettings(skip_type="quad", timesteps=args.timesteps), device)
    model = load_unet(config, None).to(device)
    files = {FULL: MODEL / "unet.safetensors", "W8A8": MODEL / "w8a8.safetensors", "W4A8": MODEL / "w4a8.safetensors"}
    networks = {FULL: model} | {name: load_packed(file)[0].to(device) for name, file in files.items() if name != FULL}
    files["W4A8 nearest"] = args.output / "w4a8_nearest.safetensors"
    networks["W4A8 nearest"] = nearest_rounding(model, sampler, files["W4A8 nearest"])

    quantized = {name: network for name, network in networks.items() if name != FULL}
    indices = range(args.images)
    errors = trajectory_errors(lambda callback: sampler(model, indices, 0, callback), quantized)
    images, seconds = {}, {}
    for name, network in networks.items():
        start = time.perf_counter()
        images[name] = to_uint8(sampler(network, indices, 0))
        seconds[name] = (time.perf_counter() - start) / args.images

    print(f"\n{'':14} {'file MB':>8} {'PSNR dB':>8} {'SSIM':>7} {'eps error':>10} {'s/image':>8}")
    for name in networks:
        size = files[name].stat().st_size / 1e6
        if name == FULL:
            print(f"{name:14} {size:8.2f} {'':8} {'':7} {'':10} {seconds[name]:8.2f}   (stored in half precision)")
            continue
        quality = f"{psnr(images[name], images[FULL]):8.1f} {ssim(images[name], images[FULL]):7.3f} {errors[name].mean:10.4f}"
        print(f"{name:14} {size:8.2f} {quality} {seconds[name]:8.2f}")
    with atomic_write(args.output / "demo.png") as temporary, temporary.open("wb") as file:
        label_rows({name: make_grid(batch, columns=args.images, scale=2) for name, batch in images.items()}).save(file, format="PNG")
    print(f"\n{args.output / 'demo.png'}: one row for each line of the table, the same {args.images} noises")


if __name__ == "__main__":
    run_main(main)
