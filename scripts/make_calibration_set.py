"""Draw a calibration set from a pixel model's own sampling trajectory, in the published file format.

    python scripts/make_calibration_set.py --config configs/cifar10.yml --use_pretrained \
        --timesteps 100 --eta 0 --skip_type quad --cali_st 20 --cali_n 256 -o calibration/cifar10.pt

The file holds lists over time steps: xs ([N, C, H, W] each) and ts ([N] each).
"""

import argparse
from pathlib import Path

import common  # noqa: F401 - makes the packages importable
from common.options import Parser, add_run_options, positive, run_main, seed, select_device
from common.running import log_to, setup_threads
from ddim.config import load_config
from ddim.sampling import PixelSampler, SamplerSettings, make_calibration_set
from ddim.weights import load_unet
from qdiff.calibration.dataset import save_set
from qdiff.config import CalibrationConfig, ConfigError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file of the model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--use_pretrained", action="store_true", help="the weights that the configuration names")
    parser.add_argument("--seed", type=seed, default=1234)
    parser.add_argument("--sample_type", default="generalized", choices=["generalized", "dpm_solver", "ddpm_noisy"])
    parser.add_argument("--skip_type", default="quad", choices=["uniform", "quad"])
    parser.add_argument("--timesteps", type=positive, default=100, help="sampling steps")
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--cali_st", type=positive, default=20, help="time steps to keep")
    parser.add_argument("--cali_n", type=positive, default=256, help="samples of each time step")
    parser.add_argument("--ckpt", help="local full-precision checkpoint (.ckpt, .pth, .safetensors)")
    add_run_options(parser, resumable=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    device = select_device(args.device)
    config = load_config(args.config)
    if not (args.ckpt or args.use_pretrained):
        raise ConfigError("no weights: expected --use_pretrained or --ckpt FILE")
    settings = SamplerSettings(args.sample_type, args.skip_type, args.timesteps, args.eta).validate(config.diffusion)
    sampler = PixelSampler(config, settings, device)
    if args.cali_st > sampler.evaluations:
        raise ConfigError(f"--cali_st {args.cali_st}: the sampler makes only {sampler.evaluations} steps")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    log_to(None, args.verbose)
    network = load_unet(config, args.ckpt).to(device)
    data = make_calibration_set(network, sampler, args.seed, CalibrationConfig(steps=args.cali_st, samples=args.cali_n))
    save_set(args.output, data)
    print(f"{args.output}: {len(data.xs)} time steps of {len(data.xs[0])} samples each")


if __name__ == "__main__":
    run_main(main)
