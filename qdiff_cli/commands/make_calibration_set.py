"""Generate a calibration set from the sampling trajectory of a model, in the published file format."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ddim import sampling as pixel
from ddim.config import PixelConfig
from ddim.diffusers_format import resolve_config as resolve_pixel_config
from ddim.samplers import PIXEL_SAMPLERS, PixelSamplerConfig
from ddim.weights import load_unet
from ldm import sampling as latent
from ldm.checkpoint import open_checkpoint
from ldm.conditions import calibration_prompt, class_conditions, parse_classes, read_prompts, text_conditions
from ldm.config import LatentConfig
from ldm.diffusers_format import resolve_config as resolve_latent_config
from ldm.encoders import ClassEmbedder
from ldm.samplers import LATENT_SAMPLERS, LatentSamplerConfig
from qdiff.calibration.data import CalibrationSet, save_set, validate_num_timesteps
from qdiff.config import CalibrationConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.files import check_writable
from qdiff_cli.commands.sample_ddim import SAMPLER_RULES
from qdiff_cli.families import is_latent
from qdiff_cli.model_files import CHECKPOINT_HELP, local_checkpoint
from qdiff_cli.options import (
    DeviceOptions,
    ParsedArgs,
    Parser,
    Rule,
    add_device_options,
    positive,
    project_file,
    seed,
)
from qdiff_cli.runs import log_to

PIXEL_RULES = (
    *SAMPLER_RULES,
    Rule(
        "cali_batch_size",
        lambda args: False,
        "for latent models: the batch size of a pixel model is its configuration's",
    ),
    Rule(
        "scale classes from_file",
        lambda args: False,
        "for models with text or classes: this one is unconditional",
    ),
)


@dataclass(frozen=True)
class CalibrationSetOptions:
    """The options of make_calibration_set.py. `make_parser` describes them."""

    config: PixelConfig | LatentConfig
    output: Path
    use_pretrained: bool
    ckpt: Path | None
    seed: int
    sample_type: str
    skip_type: str
    timesteps: int
    eta: float
    scale: float
    from_file: Path | None
    classes: str | None
    recipe: CalibrationConfig
    device: DeviceOptions
    verbose: bool


def make_parser() -> Parser:
    """The parser of the command's options."""
    parser = Parser((__doc__ or "").splitlines()[0])
    help_text = "YAML file of the model; a folder of diffusers (--ckpt) does not need it"
    parser.add_argument("--config", type=project_file, help=help_text)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    help_text = "use the full-precision weights that the configuration names"
    parser.add_argument("--use_pretrained", action="store_true", help=help_text)
    parser.add_argument("--ckpt", type=project_file, help=CHECKPOINT_HELP)
    parser.add_argument("--seed", type=seed, default=1234, help="seed of the noise")
    choices = PIXEL_SAMPLERS.names() + LATENT_SAMPLERS.names()
    parser.add_argument(
        "--sample_type", choices=choices, help="sampler (default: generalized for pixel models, ddim for latent models)"
    )
    help_text = "spacing of the time steps (pixel models)"
    parser.add_argument("--skip_type", default="quad", choices=["uniform", "quad"], help=help_text)
    parser.add_argument("--timesteps", type=positive, default=100, help="sampling steps")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 as DDPM")
    parser.add_argument("--scale", type=float, help="guidance of models with text or classes (default: 7.5)")
    help_text = "file of prompts, one on each line (default: prompts.txt beside the YAML file)"
    parser.add_argument("--from-file", dest="from_file", type=Path, help=help_text)
    parser.add_argument("--classes", help="class numbers, such as 25,187, used in turn (default: all)")
    parser.add_argument("--cali_st", type=positive, default=20, help="time steps of the calibration set")
    parser.add_argument("--cali_n", type=positive, default=256, help="samples of each time step")
    parser.add_argument("--cali_batch_size", type=positive, default=32, help="samples of one batch (latent models)")
    group = parser.add_argument_group("run")
    add_device_options(group)
    group.add_argument("--verbose", action="store_true", help="log details")
    return parser


def latent_rules(kind: type | None) -> tuple[Rule, ...]:
    """The rules for a latent model with the conditioner class `kind` (None: unconditional)."""
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


def parse(argv: Sequence[str] | None) -> CalibrationSetOptions:
    """Parse the arguments of the command, and check them against the configuration of the model."""
    args = make_parser().parse_args(argv)
    ckpt = None if args.ckpt is None else local_checkpoint(args.ckpt)
    config: PixelConfig | LatentConfig
    if is_latent(args.config, ckpt):
        config = resolve_latent_config(args.config, ckpt)
        conditioning = config.conditioning
        args.validate(latent_rules(None if conditioning is None else conditioning.kind))
        if not args.ckpt:
            raise ConfigError("no weights: expected --ckpt FILE or FOLDER")
        known = LATENT_SAMPLERS.names()
    else:
        config = resolve_pixel_config(args.config, ckpt)
        args.validate(PIXEL_RULES)
        if not (args.ckpt or args.use_pretrained):
            raise ConfigError("no weights: expected --use_pretrained or --ckpt FILE")
        known = PIXEL_SAMPLERS.names()
    _fill_defaults(args, known)
    recipe = CalibrationConfig(
        num_timesteps=args.cali_st, samples=args.cali_n, batch_size=args.cali_batch_size
    ).validate()
    return args.make(CalibrationSetOptions, config=config, ckpt=ckpt, recipe=recipe, device=args.make(DeviceOptions))


def _fill_defaults(args: ParsedArgs, known: list[str]) -> None:
    """Set the options whose default depends on the model. ConfigError for a sampler of another family."""
    args.sample_type = args.sample_type or known[0]
    args.scale = 7.5 if args.scale is None else args.scale
    if args.sample_type not in known:
        raise ConfigError(f"--sample_type {args.sample_type}: expected one of {', '.join(known)} for this model")


def make_pixel_set(options: CalibrationSetOptions, config: PixelConfig, device: torch.device) -> CalibrationSet:
    """Generate the calibration set of a pixel model."""
    settings = PixelSamplerConfig(options.sample_type, options.skip_type, options.timesteps, options.eta)
    sampler = pixel.PixelSampler(config, settings.validate(config.diffusion), device)
    validate_num_timesteps(options.recipe.num_timesteps, sampler.evaluations)
    network = load_unet(config, options.ckpt).to(device)
    return pixel.make_calibration_set(network, sampler, options.seed, options.recipe)


def make_latent_set(options: CalibrationSetOptions, config: LatentConfig, device: torch.device) -> CalibrationSet:
    """Generate the calibration set of a latent model."""
    settings = LatentSamplerConfig(options.sample_type, options.timesteps, options.eta, options.scale)
    checkpoint = open_checkpoint(options.ckpt or "", config)
    model_parts = cache(lambda: checkpoint.model_parts().to(device))
    sampler = latent.LatentSampler(config, settings.validate(config), device)
    conditioning = config.conditioning
    if conditioning is not None and conditioning.kind is ClassEmbedder:
        classes = parse_classes(options.classes, int(conditioning.params["n_classes"]) - 1)
        sampler.conditions = class_conditions(model_parts, classes)
    elif conditioning is not None:
        prompts = read_prompts(options.from_file) if options.from_file else None
        prompt_of = (lambda i: prompts[i % len(prompts)]) if prompts else calibration_prompt(config.prompts)
        sampler.conditions = text_conditions(model_parts, prompt_of)
    validate_num_timesteps(options.recipe.num_timesteps, sampler.evaluations)
    return latent.make_calibration_set(checkpoint.unet().to(device), sampler, options.seed, options.recipe)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    device = options.device.apply()
    check_writable(options.output)
    log_to(None, options.verbose)
    try:
        if isinstance(options.config, LatentConfig):
            data = make_latent_set(options, options.config, device)
        else:
            data = make_pixel_set(options, options.config, device)
    except (ConfigError, CheckpointError) as error:
        raise error.renamed({"timesteps": "--timesteps"}) from None
    save_set(options.output, data)
    print(f"{options.output}: {len(data.xs)} time steps of {len(data.xs[0])} samples each")
