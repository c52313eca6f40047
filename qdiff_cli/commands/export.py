"""Convert a calibrated checkpoint between the published format and the packed one, or export it to ONNX.

The network of a pipeline of diffusers that `qdiff.diffusers.quantize_pipeline` quantized is exported too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from ddim.config import load_config as load_pixel_config
from ddim.samplers import PixelSamplerConfig
from ddim.sampling import PixelSampler, pixel_task
from ldm.checkpoint import open_checkpoint
from ldm.config import load_config as load_latent_config
from ldm.samplers import LatentSamplerConfig
from ldm.sampling import LatentSampler, latent_task
from qdiff.checkpoint import midpoint_weights, save_packed, save_published
from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.checkpoint.packed import remembered_info
from qdiff.engines.onnx import export_onnx
from qdiff.errors import ConfigError
from qdiff.task import QuantizationTask
from qdiff.utils.extras import require_extra
from qdiff.utils.files import check_writable
from qdiff_cli.families import is_latent
from qdiff_cli.options import Parser, Rule, positive, project_file
from qdiff_cli.quantization import load_calibrated, write_model_parts
from qdiff_cli.quantization_options import RULES, QuantizationOptions, add_quantization_options
from qdiff_cli.runs import log_to

CPU = torch.device("cpu")
OF_PIPELINES = "for a calibrated file: a folder of diffusers holds its settings"
EXPORT_RULES = (
    Rule(
        "config ckpt use_pretrained quant_act weight_bit act_bit sm_abit quant_mode a_sym split H W",
        lambda args: not args.cali_ckpt.is_dir(),
        OF_PIPELINES,
    ),
    *RULES,
    Rule("resume_w", lambda args: False, "in a sampling script: nothing is calibrated here"),
    Rule(
        "batch_size H W",
        lambda args: args.output.suffix == ".onnx",
        "for an .onnx file: other formats take any size",
    ),
)


@dataclass(frozen=True)
class ExportOptions:
    """The options of export.py. `parse` describes them."""

    config: Path | None
    output: Path
    batch_size: int | None
    H: int | None
    W: int | None
    use_pretrained: bool
    ckpt: Path | None
    cali_ckpt: Path
    quantization: QuantizationOptions


def parse(argv: Sequence[str] | None) -> ExportOptions:
    """Parse and check the arguments of the command; None: those of this process."""
    parser = Parser((__doc__ or "").splitlines()[0])
    help_text = "YAML file of the model; the folder of a quantized pipeline of diffusers needs none"
    parser.add_argument("--config", type=project_file, help=help_text)
    help_text = "file to write; its suffix selects the format: .safetensors (packed), .pth (published), .onnx"
    parser.add_argument("-o", "--output", type=Path, required=True, help=help_text)
    parser.add_argument("--batch_size", type=positive, help="fixed batch size of an ONNX network (default: any)")
    for side, name in (("H", "height"), ("W", "width")):
        help_text = f"fixed {name} of the images of an ONNX network, in pixels (default: any)"
        parser.add_argument(f"--{side}", type=positive, help=help_text)
    help_text = "use the full-precision weights that the configuration names"
    parser.add_argument("--use_pretrained", action="store_true", help=help_text)
    parser.add_argument("--ckpt", type=project_file, help="local full-precision checkpoint (.ckpt, .pth, .safetensors)")
    add_quantization_options(parser)
    args = parser.parse_args(argv)
    if not args.cali_ckpt:
        raise ConfigError("--cali_ckpt: expected the checkpoint to convert")
    if args.output.suffix not in (".safetensors", ".pth", ".onnx"):
        raise ConfigError(
            f"-o {args.output}: expected a name ending in .safetensors (packed), .pth (published) or .onnx"
        )
    is_pipeline = args.cali_ckpt.is_dir()
    if is_pipeline and args.output.suffix != ".onnx":
        raise ConfigError(f"-o {args.output}: expected a name ending in .onnx for {args.cali_ckpt}, a folder")
    args.ptq = True  # a calibrated checkpoint holds a quantized network
    args.validate(EXPORT_RULES)
    if args.config is None and not is_pipeline:
        message = ": expected the YAML file of the model; only the folder of a quantized pipeline needs none"
        raise ConfigError(message, field="config")
    return args.make(ExportOptions, quantization=args.make(QuantizationOptions))


def make_task(options: ExportOptions, config: Path) -> QuantizationTask:
    """The model of the YAML file. Its sampler is not used."""
    if not is_latent(config):
        pixel = load_pixel_config(config)
        return pixel_task(pixel, options.ckpt, PixelSampler(pixel, PixelSamplerConfig(), CPU), seed=0)
    if options.use_pretrained and not options.ckpt:
        raise ConfigError(
            "--use_pretrained: the configuration of a latent model names no weights; give them with --ckpt"
        )
    latent, ckpt = load_latent_config(config), options.ckpt
    checkpoint = cache(lambda: open_checkpoint(ckpt or "", latent))
    return latent_task(checkpoint, LatentSampler(latent, LatentSamplerConfig(), CPU), seed=0)


def example_inputs(
    options: ExportOptions, config: Path, task: QuantizationTask
) -> tuple[list[torch.Tensor], list[dict[int, str]]]:
    """Example inputs of the ONNX network: x, t and the context of a text model.

    Returns:
        The tensors, and for each tensor the names of the dimensions that are not fixed.

    Raises:
        ConfigError: the network cannot process images of the size --H, --W.
    """
    channels, size, _ = task.input_shape
    height, width = (size if side is None else input_size(config, task, side) for side in (options.H, options.W))
    batch = options.batch_size or 2  # the export would fix the batch size at an example of 1
    inputs = [torch.randn(batch, channels, height, width), torch.full((batch,), 500.0)]
    names = [{0: "batch", 2: "height", 3: "width"}, {0: "batch"}]
    if task.context_dim is not None:
        conditioning = load_latent_config(config).conditioning
        length = 77 if conditioning is None else int(conditioning.params.get("max_length", 77))
        inputs.append(torch.randn(batch, length, task.context_dim))
        names.append({0: "batch", 1: "length"})
    given = {"batch": options.batch_size, "height": options.H, "width": options.W}
    fixed = {name for name, value in given.items() if value}
    return inputs, [{axis: name for axis, name in axes.items() if name not in fixed} for axes in names]


def input_size(config: Path, task: QuantizationTask, pixels: int) -> int:
    """The height or width of x_t for a height or width of the images in pixels.

    Raises:
        ConfigError: the network cannot halve the side as often as it must.
    """
    factor = 1
    if is_latent(config):
        factor = load_latent_config(config).downsampling
    levels = len(task.unet_config.get("channel_mult") or task.unet_config["ch_mult"])
    unit = factor * 2 ** (levels - 1)
    if pixels % unit:
        raise ConfigError(f"--H, --W: {pixels}, expected a multiple of {unit}")
    return pixels // factor


def export_pipeline(options: ExportOptions) -> None:
    """Write the network of a quantized pipeline as ONNX.

    Raises:
        ConfigError: the folder holds no such network, or it cannot be exported.
    """
    folder = options.cali_ckpt
    if DiffusersFolder.find(folder) is None:
        raise ConfigError(f" {folder}: expected a file, or the folder of a quantized pipeline", field="cali_ckpt")
    from qdiff.diffusers import export_network, load_network  # needs an extra

    export_network(options.output, load_network(folder), options.batch_size)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    output = options.output
    if output.suffix == ".onnx":
        require_extra("export", "onnx", "onnxscript")
    check_writable(output)
    log_to(None, verbose=False)
    if options.config is None:
        export_pipeline(options)
    else:
        convert(options, options.config)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


def convert(options: ExportOptions, config: Path) -> None:
    """Write a calibrated file of the model in `config` in another format."""
    output, suffix = options.output, options.output.suffix
    task = make_task(options, config)
    quantization = options.quantization.resolve(task, run_seed=0)
    assert quantization is not None  # --ptq is implied
    network = load_calibrated(options.cali_ckpt, task, quantization.formats)
    if suffix == ".onnx":
        export_onnx(output, network, *example_inputs(options, config, task), output=task.prediction.kind)
    elif suffix == ".safetensors":
        info = remembered_info(network)
        assert info is not None  # `load_calibrated` attaches it
        parts = write_model_parts(task, output.parent) if options.ckpt else info.model_parts
        save_packed(output, network, replace(info, model_parts=parts))
    else:
        has_weights = options.ckpt or options.use_pretrained
        weights = task.load_unet().state_dict() if has_weights else midpoint_weights(network)
        save_published(output, network, task.architecture, weights, activations=quantization.formats.quant_act)
