"""Sample images from a pixel-space DDPM, in full precision or quantized, calibrating it first if needed."""

import argparse
from pathlib import Path

from ddim.config import PixelConfig, load_config
from ddim.sampling import PixelSampler, SamplerSettings, pixel_task_parts
from qdiff.errors import ConfigError
from qdiff_cli.images import to_uint8
from qdiff_cli.options import (
    Parser,
    Rule,
    add_quant_options,
    add_run_options,
    check_typed,
    positive,
    project_file,
    seed,
    select_device,
)
from qdiff_cli.quantization import QuantizationTask, check
from qdiff_cli.running import setup_threads
from qdiff_cli.sampling_run import SamplingRun, run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", type=project_file, required=True, help="YAML file of the model")
    parser.add_argument("-l", "--logdir", default="results", help="output folder")
    parser.add_argument("--use_pretrained", action="store_true", help="the weights that the configuration names")
    parser.add_argument("--seed", type=seed, default=1234)
    parser.add_argument("--sample_type", default="generalized", choices=["generalized", "dpm_solver", "ddpm_noisy"])
    parser.add_argument("--skip_type", default="uniform", choices=["uniform", "quad"], help="spacing of the time steps")
    parser.add_argument("--timesteps", type=positive, default=1000, help="sampling steps")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 as DDPM")
    parser.add_argument("--max_images", type=positive, default=50000)
    parser.add_argument("--batch_size", type=positive, help="images sampled at a time (default: the configuration's)")
    parser.add_argument("--ckpt", type=project_file, help="local full-precision checkpoint (.ckpt, .pth, .safetensors)")
    add_run_options(parser)
    add_quant_options(parser)
    return parser.parse_args(argv)


SAMPLER_RULES = (
    Rule(
        "eta",
        lambda args: args.sample_type in (None, "generalized"),
        "with --sample_type generalized (DDIM)",
        lambda args, value: value == 0 and args.sample_type == "dpm_solver",
    ),
    Rule(
        "skip_type",
        lambda args: args.sample_type != "dpm_solver",
        "with another --sample_type: the steps of dpm_solver are uniform",
        lambda args, value: value == "uniform",
    ),
)


def make_task(args: argparse.Namespace, config: PixelConfig, sampler: PixelSampler) -> QuantizationTask:
    if not (args.ckpt or args.use_pretrained or args.cali_ckpt):
        raise ConfigError("no weights: expected --use_pretrained, --ckpt FILE or --cali_ckpt FILE")
    return QuantizationTask(**pixel_task_parts(config, args.ckpt, sampler, args.seed))


def prepare(args: argparse.Namespace) -> SamplingRun:
    """The job that the options describe, checked."""
    setup_threads(args.threads)
    device = select_device(args.device)
    check_typed(args, SAMPLER_RULES)
    config = load_config(args.config)
    settings = SamplerSettings(args.sample_type, args.skip_type, args.timesteps, args.eta).validate(config.diffusion)
    sampler = PixelSampler(config, settings, device)
    task = make_task(args, config, sampler)
    check(args, task)
    return SamplingRun(
        title=f"pixel DDPM ({config.path.stem}), {args.sample_type}, {args.timesteps} {args.skip_type} steps",
        args=args,
        device=device,
        task=task,
        draw=lambda network, indices, callback=None: sampler(network, indices, args.seed, callback),
        decode=to_uint8,
        denoiser=sampler.denoiser,
        total=args.max_images,
        batch_size=args.batch_size or config.batch_size,
        runs=Path(args.logdir) / "samples",
    )


def main(argv: list[str] | None = None) -> Path:
    return run(prepare(parse(argv)))
