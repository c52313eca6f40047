"""Convert a calibrated checkpoint between the published format and the packed one, or export it to ONNX."""

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from ddim.config import load_config as load_pixel_config
from ddim.sampling import PixelSampler, SamplerSettings, pixel_task_parts
from ldm.checkpoint import open_checkpoint
from ldm.config import load_config as load_latent_config
from ldm.sampling import LatentSampler, LatentSettings, latent_task_parts
from qdiff.checkpoint import midpoint_weights, save_packed, save_published
from qdiff.config import ConfigError
from qdiff.extras import require_extra
from qdiff.onnx import export_onnx
from qdiff_cli.options import Parser, add_quant_options, add_run_options, positive, project_file, quant_config, seed, select_device
from qdiff_cli.quantize import Task, is_latent, load_calibrated, write_stages


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", type=project_file, required=True, help="YAML file of the model")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".safetensors: packed; .pth: published; .onnx: ONNX")
    parser.add_argument("--batch_size", type=positive, default=1, help="rows of the inputs of an ONNX network")
    parser.add_argument("--use_pretrained", action="store_true", help="take full-precision weights from the configuration's")
    parser.add_argument("--seed", type=seed, default=1234)
    parser.add_argument("--ckpt", type=project_file, help="local full-precision checkpoint (.ckpt, .pth, .safetensors)")
    add_run_options(parser, resumable=False)
    add_quant_options(parser)
    return parser.parse_args(argv)


def pixel_task(args: argparse.Namespace) -> Task:
    config = load_pixel_config(args.config)
    sampler = PixelSampler(config, SamplerSettings(), select_device("cpu"))
    return Task(**pixel_task_parts(config, args.ckpt, sampler, args.seed))


def latent_task(args: argparse.Namespace) -> Task:
    if args.use_pretrained and not args.ckpt:
        raise ConfigError("--use_pretrained: the configuration of a latent model names no weights; give them with --ckpt")
    config = load_latent_config(args.config)
    checkpoint = cache(lambda: open_checkpoint(args.ckpt, config))
    sampler = LatentSampler(config, LatentSettings(), select_device("cpu"))
    parts = latent_task_parts(checkpoint, sampler, args.seed, ("mse", "mse"))
    return Task(**parts, save_stages=lambda path: checkpoint().stages().save(path))


def example_inputs(args: argparse.Namespace, task: Task) -> list[torch.Tensor]:
    """Inputs of the shapes that the ONNX network is to take: x, t, and the context of a text model."""
    inputs = [torch.randn(args.batch_size, *task.input_shape), torch.full((args.batch_size,), 500.0)]
    if width := task.build.get("context_dim"):
        config = load_latent_config(args.config)
        inputs.append(torch.randn(args.batch_size, int(config.conditioning.params.get("max_length", 77)), width))
    return inputs


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.cali_ckpt:
        raise ConfigError("--cali_ckpt: expected the checkpoint to convert")
    if args.output.suffix not in (".safetensors", ".pth", ".onnx"):
        raise ConfigError(f"-o {args.output}: expected a name ending in .safetensors (packed), .pth (published) or .onnx")
    if args.output.suffix == ".onnx":
        require_extra("export", "onnx", "onnxscript")
    task = (latent_task if is_latent(args.config) else pixel_task)(args)
    quant = quant_config(args, task.weight_method, task.act_method)
    network, info = load_calibrated(args.cali_ckpt, task, quant)
    if args.output.suffix == ".onnx":
        export_onnx(args.output, network, example_inputs(args, task))
    elif args.output.suffix == ".safetensors":
        stages = write_stages(task, args.output.parent) if args.ckpt else info.stages
        save_packed(args.output, network, replace(info, stages=stages))
    else:
        weights = task.load().state_dict() if args.ckpt or args.use_pretrained else midpoint_weights(network)
        save_published(args.output, network, task.family, weights, activations=quant.quant_act)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")
