"""Compare calibrated packed checkpoints of a pixel model with full precision and with nearest rounding.

    python scripts/evaluate_embedded.py --checkpoints models/ddim/emoji32/w8a8.safetensors models/ddim/emoji32/w4a8.safetensors

For each checkpoint, as calibrated and with weights only: the trajectory error (mean over the steps of
||eps_q - eps|| / ||eps|| at the full-precision x_t, DDIM 50 quad, eta 0, images 0 to 63 of seed 0 as one
batch), and PSNR and SSIM of the final images against full precision from the same noise. Beside it the
same setting by nearest rounding with min-max ranges.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn

from common import REPOSITORY
from common.images import to_uint8
from common.options import Parser, positive, run_main, select_device
from common.running import log_to, setup_threads
from ddim.config import load_config
from ddim.family import PIXEL
from ddim.sampling import PixelSampler, SamplerSettings, make_calibration_set
from ddim.weights import load_unet
from qdiff.analysis import psnr, ssim, trajectory_errors
from qdiff.calibration.run import calibrate
from qdiff.checkpoint import load_packed
from qdiff.config import CalibrationConfig, QuantConfig


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(REPOSITORY / "configs/emoji32.yml"))
    parser.add_argument("--checkpoints", nargs="+", required=True, help="packed calibrated checkpoints")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--timesteps", type=positive, default=50)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(argv)


def describe(quant: QuantConfig) -> str:
    acts = f"A{quant.act_bit} {'symmetric' if quant.a_sym else 'asymmetric'}" if quant.quant_act else "A32"
    return f"W{quant.weight_bit}{acts}, {'split' if quant.split else 'no split'}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    log_to(None, verbose=False)
    device = select_device(args.device)
    config = load_config(args.config)
    sampler = PixelSampler(config, SamplerSettings(skip_type="quad", timesteps=args.timesteps), device)
    model = load_unet(config, None).to(device)
    recipe = CalibrationConfig(steps=20, samples=32)
    rows = make_calibration_set(model, sampler, seed=1234, config=recipe).select(recipe.steps, recipe.samples)

    networks: dict[str, nn.Module] = {}
    for path in args.checkpoints:
        for activations in (True, False):
            network, info = load_packed(path, activations)
            label = describe(info.config)
            networks[f"{label}, {Path(path).name}"] = network.to(device)
            linear = replace(info.config, quant_mode="linear", weight_scale_method="max", act_scale_method="max")
            if f"{label}, nearest" not in networks:
                networks[f"{label}, nearest"] = calibrate(model, PIXEL, linear, recipe, rows)
    indices = range(args.images)
    errors = trajectory_errors(lambda callback: sampler(model, indices, 0, callback), networks)
    reference = to_uint8(sampler(model, indices, 0))
    print("\n| setting | trajectory error | PSNR dB | SSIM |\n|---|---|---|---|")
    for name, network in sorted(networks.items()):
        images = to_uint8(sampler(network, indices, 0))
        print(f"| {name} | {errors[name].mean:.4f} | {psnr(images, reference):.1f} | {ssim(images, reference):.3f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
