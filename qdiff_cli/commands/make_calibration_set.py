"""Draw a calibration set from a model's own sampling trajectory, in the published file format."""

import argparse
from functools import cache
from pathlib import Path

import torch

from ddim import sampling as pixel
from ddim.config import load_config as load_pixel_config
from ddim.weights import load_unet
from ldm import sampling as latent
from ldm.checkpoint import open_checkpoint
from ldm.conditions import calibration_prompt, class_conditions, parse_classes, read_prompts, text_conditions
from ldm.config import load_config as load_latent_config
from ldm.encoders import ClassEmbedder
from qdiff.calibration.data import CalibrationSet, check_steps, save_set
from qdiff.config import CalibrationConfig
from qdiff.errors import ConfigError
from qdiff.utils.files import check_writable
from qdiff_cli.commands.sample_ddim import SAMPLER_RULES
from qdiff_cli.options import Parser, Rule, add_run_options, check_typed, positive, project_file, seed, select_device
from qdiff_cli.quantization import is_latent
from qdiff_cli.running import log_to, setup_threads

PIXEL_SAMPLERS, LATENT_SAMPLERS = ["generalized", "dpm_solver", "ddpm_noisy"], ["ddim", "plms", "dpm", "vanilla"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", type=project_file, required=True, help="YAML file of the model, of any family")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    parser.add_argument("--use_pretrained", action="store_true", help="the weights that the configuration names")
    parser.add_argument(
        "--ckpt",
        type=project_file,
        help="local full-precision checkpoint (.ckpt, .pth, .safetensors), or a bundled model's folder",
    )
    parser.add_argument("--seed", type=seed, default=1234)
    parser.add_argument(
        "--sample_type", choices=PIXEL_SAMPLERS + LATENT_SAMPLERS, help="default: generalized (pixel), ddim (latent)"
    )
    parser.add_argument(
        "--skip_type", default="quad", choices=["uniform", "quad"], help="spacing of the time steps (pixel models)"
    )
    parser.add_argument("--timesteps", type=positive, default=100, help="sampling steps")
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--scale", type=float, help="guidance, of models with text or classes (default: 7.5)")
    parser.add_argument(
        "--from-file",
        dest="from_file",
        type=Path,
        help="prompts, one a line (default: prompts.txt beside the YAML file)",
    )
    parser.add_argument("--classes", help="class numbers, in turn: 25,187 (default: all)")
    parser.add_argument("--cali_st", type=positive, default=20, help="time steps to keep")
    parser.add_argument("--cali_n", type=positive, default=256, help="samples of each time step")
    parser.add_argument("--cali_batch_size", type=positive, default=32, help="batch size (latent models)")
    add_run_options(parser, resumable=False)
    return parser.parse_args(argv)


def choose(args: argparse.Namespace, known: list[str]) -> str:
    if (args.sample_type or known[0]) not in known:
        raise ConfigError(f"--sample_type {args.sample_type}: expected one of {', '.join(known)} for this model")
    return args.sample_type or known[0]


PIXEL_RULES = (
    *SAMPLER_RULES,
    Rule(
        "cali_batch_size",
        lambda args: False,
        "for latent models: the batch size of a pixel model is its configuration's",
    ),
    Rule("scale classes from_file", lambda args: False, "for models with text or classes: this one is unconditional"),
)


def latent_rules(kind: type | None) -> tuple[Rule, ...]:
    """When options act for a latent model, conditioned by `kind` (None: unconditional)."""
    return (
        Rule("use_pretrained skip_type", lambda args: False, "for pixel models"),
        Rule(
            "eta",
            lambda args: args.sample_type in (None, "ddim"),
            "with --sample_type ddim",
            lambda args, value: value == (1 if args.sample_type == "vanilla" else 0),
        ),
        Rule(
            "timesteps",
            lambda args: args.sample_type != "vanilla",
            "with another --sample_type: vanilla takes every time step",
        ),
        Rule("scale", lambda args: kind is not None, "for models with text or classes: this one is unconditional"),
        Rule("classes", lambda args: kind is ClassEmbedder, "for models with classes"),
        Rule("from_file", lambda args: kind not in (None, ClassEmbedder), "for models with text"),
    )


def draw_pixel(args: argparse.Namespace, recipe: CalibrationConfig, device: torch.device) -> CalibrationSet:
    config = load_pixel_config(args.config)
    check_typed(args, PIXEL_RULES)
    if not (args.ckpt or args.use_pretrained):
        raise ConfigError("no weights: expected --use_pretrained or --ckpt FILE")
    name = choose(args, PIXEL_SAMPLERS)
    settings = pixel.PixelSamplerConfig(name, args.skip_type, args.timesteps, args.eta).validate(config.diffusion)
    sampler = pixel.PixelSampler(config, settings, device)
    check_steps(args.cali_st, sampler.evaluations)
    return pixel.make_calibration_set(load_unet(config, args.ckpt).to(device), sampler, args.seed, recipe)


def draw_latent(args: argparse.Namespace, recipe: CalibrationConfig, device: torch.device) -> CalibrationSet:
    config = load_latent_config(args.config)
    if not args.ckpt:
        raise ConfigError("no weights: expected --ckpt FILE or FOLDER")
    check_typed(args, latent_rules(None if config.conditioning is None else config.conditioning.kind))
    scale = 7.5 if args.scale is None else args.scale
    settings = latent.LatentSamplerConfig(choose(args, LATENT_SAMPLERS), args.timesteps, args.eta, scale).validate(config)
    checkpoint = open_checkpoint(args.ckpt, config)
    model_parts = cache(lambda: checkpoint.model_parts().to(device))
    sampler = latent.LatentSampler(config, settings, device)
    if config.conditioning is not None and config.conditioning.kind is ClassEmbedder:
        sampler.conditions = class_conditions(
            model_parts, parse_classes(args.classes, int(config.conditioning.params["n_classes"]) - 1)
        )
    elif config.conditioning is not None:
        prompts = read_prompts(args.from_file) if args.from_file else None
        prompt_of = (lambda i: prompts[i % len(prompts)]) if prompts else calibration_prompt(config.path)
        sampler.conditions = text_conditions(model_parts, prompt_of)
    check_steps(args.cali_st, sampler.evaluations)
    return latent.make_calibration_set(checkpoint.unet().to(device), sampler, args.seed, recipe)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    device = select_device(args.device)
    recipe = CalibrationConfig(steps=args.cali_st, samples=args.cali_n, batch_size=args.cali_batch_size).validate()
    check_writable(args.output)
    log_to(None, args.verbose)
    data = (draw_latent if is_latent(args.config) else draw_pixel)(args, recipe, device)
    save_set(args.output, data)
    print(f"{args.output}: {len(data.xs)} time steps of {len(data.xs[0])} samples each")
