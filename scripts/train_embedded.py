"""Train an embedded pixel model on emoji and write its EMA weights in half precision.

    npm pack emoji-datasource-google@16.0.0
    python scripts/train_embedded.py --config configs/emoji32.yml --emoji emoji-datasource-google-16.0.0.tgz

The state is kept beside the output (<output>.state) and the same command continues from it.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import common  # noqa: F401 - makes the packages importable
from common.images import make_grid, save_png, to_uint8
from common.options import Parser, positive, run_main, select_device
from common.running import log_to, setup_threads
from ddim.config import load_config, training_config
from ddim.data import load_emoji
from ddim.sampling import PixelSampler, SamplerSettings
from ddim.schedule import make_alphas_cumprod
from ddim.training import train
from ddim.unet import UNet
from qdiff.files import atomic_write


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/emoji32.yml")
    parser.add_argument("--emoji", type=Path, required=True, help="the archive that `npm pack emoji-datasource-google@16.0.0` makes")
    parser.add_argument("-o", "--output", type=Path, default=Path("models/ddim/emoji32/unet.safetensors"))
    parser.add_argument("--steps", type=positive, help="training steps (default: the configuration's)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    device = select_device(args.device)
    config = load_config(args.config)
    settings = training_config(config.training)
    settings = replace(settings, steps=args.steps or settings.steps)
    log_to(None, verbose=True)
    torch.manual_seed(settings.seed)
    images = load_emoji(args.emoji, config.model.image_size)
    state_file = args.output.with_suffix(".state")
    ema = train(UNet(config.model), images, make_alphas_cumprod(config.diffusion), settings, state_file, device)
    weights = {name: tensor.half().contiguous().cpu() for name, tensor in ema.state_dict().items()}
    with atomic_write(args.output) as temporary:
        save_file(weights, temporary)
    sampler = PixelSampler(config, SamplerSettings(skip_type="quad", timesteps=50), device)
    samples = to_uint8(sampler(ema.float().to(memory_format=torch.contiguous_format), range(64), seed=0))
    save_png(args.output.with_name("samples.png"), make_grid(samples, columns=16, scale=2))


if __name__ == "__main__":
    run_main(main)
