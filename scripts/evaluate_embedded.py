"""Compare the calibrated checkpoints of the embedded models with full precision and with nearest rounding.

    python scripts/evaluate_embedded.py --models emoji32 emoji64 emoji64-text

For each of their packed checkpoints, as calibrated and with weights only: the trajectory error (mean over
the steps of ||e_q - e|| / ||e|| along the full-precision trajectory), PSNR and SSIM of the final images
against full precision, all from the same noises (and prompts); the same for nearest rounding with min-max
ranges of the same number formats.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from common.embedded import NAMES, Embedded, load_embedded
from common.options import Parser, positive, run_main, select_device
from common.running import log_to, setup_threads
from qdiff.analysis import psnr, ssim, trajectory_errors
from qdiff.checkpoint import load_packed
from qdiff.config import CalibrationConfig, QuantConfig

RECIPE = CalibrationConfig(steps=20, samples=32)  # of the baseline's ranges


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--checkpoints", nargs="+", type=Path, help="other packed checkpoints of the (one) model")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(argv)


def describe(quant: QuantConfig) -> str:
    acts = f"A{quant.act_bit} {'symmetric' if quant.a_sym else 'asymmetric'}" if quant.quant_act else "A32"
    return f"W{quant.weight_bit}{acts}, {'split' if quant.split else 'no split'}"


def load_networks(model: Embedded, checkpoints: list[Path], device: torch.device) -> dict[str, nn.Module]:
    networks: dict[str, nn.Module] = {}
    for path in checkpoints:
        for activations in (True, False):
            network, info = load_packed(path, activations)
            label = describe(info.config)
            networks[f"{label}, {path.name}"] = network.to(device)
            if f"{label}, nearest" not in networks:
                networks[f"{label}, nearest"] = model.nearest(info.config, RECIPE)
    return networks


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    log_to(None, verbose=False)
    device = select_device(args.device)
    for name in args.models:
        model = load_embedded(name, args.images, device)
        networks = load_networks(model, args.checkpoints or [model.folder / f"{kind}.safetensors" for kind in ("w8a8", "w4a8")], device)
        denoisers = {label: model.denoiser(network) for label, network in networks.items()}
        errors = trajectory_errors(lambda callback, model=model: model.sample(model.model, callback), denoisers)
        reference = model.sample(model.model)
        print(f"\n{model.title}\n\n| setting | trajectory error | PSNR dB | SSIM |\n|---|---|---|---|")
        for label, network in sorted(networks.items()):
            images = model.sample(network)
            print(f"| {label} | {errors[label].mean:.4f} | {psnr(images, reference):.1f} | {ssim(images, reference):.3f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
