"""Convert a calibrated checkpoint of a pixel model between the published format and the packed one.

    python scripts/export.py --config configs/cifar10.yml --weight_bit 4 --quant_act --a_sym --split \
        --cali_ckpt ckpt.pth -o ckpt.safetensors
    python scripts/export.py --config configs/cifar10.yml --weight_bit 4 --quant_act --a_sym --split \
        --cali_ckpt ckpt.safetensors -o ckpt.pth

The ending of the output says which format is written. Without full-precision weights (--ckpt,
--use_pretrained) a published file carries weights that lie in the middle of their rounding interval.
"""

import argparse
from pathlib import Path

from common.options import Parser, add_quant_options, add_run_options, quant_config, run_main, seed, select_device
from common.quantize import Task, load_calibrated
from ddim.config import load_config
from ddim.sampling import PixelSampler, SamplerSettings, pixel_task_parts
from qdiff.checkpoint import midpoint_weights, save_packed, save_published
from qdiff.config import ConfigError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file of the model")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".safetensors: packed; .pth: published")
    parser.add_argument("--use_pretrained", action="store_true", help="take full-precision weights from the configuration's")
    parser.add_argument("--seed", type=seed, default=1234)
    parser.add_argument("--ckpt", help="local full-precision checkpoint (.ckpt, .pth, .safetensors)")
    add_run_options(parser, resumable=False)
    add_quant_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.cali_ckpt:
        raise ConfigError("--cali_ckpt: expected the checkpoint to convert")
    if args.output.suffix not in (".safetensors", ".pth"):
        raise ConfigError(f"-o {args.output}: expected a name ending in .safetensors (packed) or .pth (published)")
    config = load_config(args.config)
    sampler = PixelSampler(config, SamplerSettings(), select_device("cpu"))
    task = Task(**pixel_task_parts(config, args.ckpt, sampler, args.seed))
    quant = quant_config(args, task.weight_method, task.act_method)
    network, info = load_calibrated(args.cali_ckpt, task, quant)
    if args.output.suffix == ".safetensors":
        save_packed(args.output, network, info)
    else:
        weights = task.load().state_dict() if args.ckpt or args.use_pretrained else midpoint_weights(network)
        save_published(args.output, network, task.family, weights, activations=quant.quant_act)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
