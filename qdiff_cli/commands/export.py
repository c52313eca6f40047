"""Convert a calibrated checkpoint between the published format and the packed one, or export it to ONNX."""

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from ddim.config import load_config as load_pixel_config
from ddim.sampling import PixelSampler, PixelSamplerConfig, pixel_task_parts
from ldm.checkpoint import open_checkpoint
from ldm.config import load_config as load_latent_config
from ldm.sampling import LatentSampler, LatentSamplerConfig, latent_task_parts
from qdiff.checkpoint import midpoint_weights, save_packed, save_published
from qdiff.engines.onnx import export_onnx
from qdiff.errors import ConfigError
from qdiff.utils.extras import require_extra
from qdiff.utils.files import check_writable
from qdiff_cli.options import (
    RULES,
    Parser,
    Rule,
    add_quant_options,
    check_typed,
    positive,
    project_file,
    quant_config,
    select_device,
)
from qdiff_cli.quantization import QuantizationTask, is_latent, load_calibrated, write_model_parts
from qdiff_cli.running import log_to


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", type=project_file, required=True, help="YAML file of the model")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help=".safetensors: packed; .pth: published; .onnx: ONNX"
    )
    parser.add_argument("--batch_size", type=positive, help="the batch size that an ONNX network takes (default: any)")
    parser.add_argument("--H", type=positive, help="the height in pixels of images of an ONNX network (default: any)")
    parser.add_argument("--W", type=positive, help="the width in pixels of images of an ONNX network (default: any)")
    parser.add_argument(
        "--use_pretrained", action="store_true", help="take full-precision weights from the configuration's"
    )
    parser.add_argument("--ckpt", type=project_file, help="local full-precision checkpoint (.ckpt, .pth, .safetensors)")
    add_quant_options(parser)
    return parser.parse_args(argv)


EXPORT_RULES = (
    *RULES,
    Rule("resume_w", lambda args: False, "in a sampling script: nothing is calibrated here"),
    Rule(
        "batch_size H W", lambda args: args.output.suffix == ".onnx", "for an .onnx file: other formats take any size"
    ),
)


def pixel_task(args: argparse.Namespace) -> QuantizationTask:
    config = load_pixel_config(args.config)
    sampler = PixelSampler(config, PixelSamplerConfig(), select_device("cpu"))
    return QuantizationTask(**pixel_task_parts(config, args.ckpt, sampler, seed=0))


def latent_task(args: argparse.Namespace) -> QuantizationTask:
    if args.use_pretrained and not args.ckpt:
        raise ConfigError(
            "--use_pretrained: the configuration of a latent model names no weights; give them with --ckpt"
        )
    config = load_latent_config(args.config)
    checkpoint = cache(lambda: open_checkpoint(args.ckpt, config))
    sampler = LatentSampler(config, LatentSamplerConfig(), select_device("cpu"))
    parts = latent_task_parts(checkpoint, sampler, 0, ("mse", "mse"))
    return QuantizationTask(**parts, save_model_parts=lambda path: checkpoint().model_parts().save(path))


def example_inputs(args: argparse.Namespace, task: QuantizationTask) -> tuple[list[torch.Tensor], list[dict[int, str]]]:
    """Inputs of the ONNX network, x, t and the context of a text model, and for each the names of the dimensions that may vary.

    Raises:
        ConfigError: --H and --W that the network cannot halve as often as it does.
    """
    channels, size, _ = task.input_shape
    height, width = (size if pixels is None else latent_size(args, task, pixels) for pixels in (args.H, args.W))
    batch = args.batch_size or 2  # an example of one row would fix the batch size
    inputs = [torch.randn(batch, channels, height, width), torch.full((batch,), 500.0)]
    names = [{0: "batch", 2: "height", 3: "width"}, {0: "batch"}]
    if width := task.build.get("context_dim"):
        config = load_latent_config(args.config)
        inputs.append(torch.randn(batch, int(config.conditioning.params.get("max_length", 77)), width))
        names.append({0: "batch", 1: "length"})
    fixed = {name for name, value in (("batch", args.batch_size), ("height", args.H), ("width", args.W)) if value}
    return inputs, [{axis: name for axis, name in axes.items() if name not in fixed} for axes in names]


def latent_size(args: argparse.Namespace, task: QuantizationTask, pixels: int) -> int:
    """A side of x_t for a side of the images."""
    factor = (
        2 ** (len(load_latent_config(args.config).first_stage.params["ddconfig"]["ch_mult"]) - 1)
        if is_latent(args.config)
        else 1
    )
    levels = len(task.build.get("channel_mult") or task.build["ch_mult"])
    unit = factor * 2 ** (levels - 1)
    if pixels % unit:
        raise ConfigError(f"--H, --W: {pixels}, expected a multiple of {unit}")
    return pixels // factor


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.cali_ckpt:
        raise ConfigError("--cali_ckpt: expected the checkpoint to convert")
    if args.output.suffix not in (".safetensors", ".pth", ".onnx"):
        raise ConfigError(
            f"-o {args.output}: expected a name ending in .safetensors (packed), .pth (published) or .onnx"
        )
    args.ptq = True  # a calibrated checkpoint is of a quantized network
    check_typed(args, EXPORT_RULES)
    if args.output.suffix == ".onnx":
        require_extra("export", "onnx", "onnxscript")
    check_writable(args.output)
    log_to(None, verbose=False)
    task = (latent_task if is_latent(args.config) else pixel_task)(args)
    quant = quant_config(args, task.weight_method, task.act_method)
    network, info = load_calibrated(args.cali_ckpt, task, quant)
    if args.output.suffix == ".onnx":
        export_onnx(args.output, network, *example_inputs(args, task), output=task.prediction.kind)
    elif args.output.suffix == ".safetensors":
        model_parts = write_model_parts(task, args.output.parent) if args.ckpt else info.model_parts
        save_packed(args.output, network, replace(info, model_parts=model_parts))
    else:
        weights = task.load().state_dict() if args.ckpt or args.use_pretrained else midpoint_weights(network)
        save_published(args.output, network, task.family, weights, activations=quant.quant_act)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")
