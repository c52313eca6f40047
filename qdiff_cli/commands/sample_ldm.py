"""Sample images from a latent diffusion model, in full precision or quantized, calibrating it first if needed."""

import argparse
from functools import cache
from pathlib import Path

import yaml

from ldm.checkpoint import open_checkpoint
from ldm.conditions import class_conditions, parse_classes
from ldm.config import LatentConfig, load_config
from ldm.encoders import ClassEmbedder
from ldm.sampling import LatentSampler, LatentSettings, latent_task_parts
from qdiff.errors import ConfigError
from qdiff.utils.files import write_text
from qdiff.utils.resources import find
from qdiff_cli.images import save_npz, to_uint8_truncated
from qdiff_cli.options import (
    Parser,
    Rule,
    add_quant_options,
    add_run_options,
    check_typed,
    positive,
    printable,
    project_file,
    seed,
    select_device,
)
from qdiff_cli.quantization import QuantizationTask, check
from qdiff_cli.running import setup_threads
from qdiff_cli.sampling_run import SamplingRun, run

NAME = "sample_{:06d}.png"
CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors", ".pth", ".pt")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "-r",
        "--resume_base",
        type=project_file,
        required=True,
        metavar="CKPT",
        help="a model's checkpoint or its folder",
    )
    parser.add_argument("-n", "--n_samples", type=positive, default=50000)
    parser.add_argument("-e", "--eta", type=float, default=1.0, help="noise of DDIM: 0 none, 1 as DDPM")
    parser.add_argument("-v", "--vanilla_sample", action="store_true", help="ancestral sampling over every time step")
    parser.add_argument("--dpm", action="store_true", help="DPM-Solver++ 2M")
    parser.add_argument("--seed", type=seed, required=True)
    parser.add_argument("-l", "--logdir", default="results", help="output folder")
    parser.add_argument(
        "-c", "--custom_steps", type=positive, default=50, help="sampling steps (400 makes 500: the range decides)"
    )
    parser.add_argument("--batch_size", type=positive, default=10)
    parser.add_argument("--classes", help="class numbers of a class-conditional model, in turn: 25,187 (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="guidance of a class-conditional model; 1: none")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the YAML file")
    add_run_options(parser)
    add_quant_options(parser)
    return parser.parse_args(argv)


SAMPLER_RULES = (
    Rule(
        "eta",
        lambda args: not (args.dpm or args.vanilla_sample),
        "with DDIM: --dpm adds no noise, --vanilla_sample that of DDPM",
        lambda args, value: value == (0 if args.dpm else 1),
    ),
    Rule("custom_steps", lambda args: not args.vanilla_sample, "without --vanilla_sample, which takes every time step"),
)


def settings_of(args: argparse.Namespace, config: LatentConfig) -> LatentSettings:
    if args.vanilla_sample and args.dpm:
        raise ConfigError("--vanilla_sample and --dpm: expected one of them")
    check_typed(args, SAMPLER_RULES)
    sampler = "vanilla" if args.vanilla_sample else "dpm" if args.dpm else "ddim"
    return LatentSettings(sampler, args.custom_steps, 0.0 if args.dpm else args.eta, args.scale).validate(config)


def check_classes(args: argparse.Namespace, config: LatentConfig) -> list[int]:
    """The classes to sample; ConfigError for a model without classes, or without such a class."""
    by_class = config.conditioning is not None and config.conditioning.kind is ClassEmbedder
    if not by_class:
        if config.conditioning is not None:
            raise ConfigError(f"{config.path}: a model with text; sample it with scripts/txt2img.py")
        if args.classes or args.scale != 1.0:
            raise ConfigError(f"--classes, --scale: {config.path} is an unconditional model")
        return []
    return parse_classes(
        args.classes, int(config.conditioning.params.get("n_classes", 1000)) - 1
    )  # the last one is "no class"


def model_folder(args: argparse.Namespace) -> Path:
    """The folder of the model: the one given, or that of the file given (a folder may have a dot in its name)."""
    path: Path = args.resume_base
    return path if path.is_dir() or not (path.is_file() or path.suffix in CHECKPOINT_SUFFIXES) else path.parent


def config_file(folder: Path) -> Path:
    """`config.yaml` beside the checkpoint, else the project's own for a model folder of this name."""
    own = folder / "config.yaml"
    return own if own.is_file() else find(Path("models/ldm", folder.absolute().name, "config.yaml"))


def prepare(args: argparse.Namespace) -> SamplingRun:
    """The job that the options describe, checked."""
    setup_threads(args.threads)
    device = select_device(args.device)
    config = load_config(config_file(model_folder(args)), args.overrides)
    settings, classes = settings_of(args, config), check_classes(args, config)
    checkpoint = cache(lambda: open_checkpoint(args.resume_base, config, args.cali_ckpt))
    model_parts = cache(lambda: checkpoint().model_parts().to(device))
    sampler = LatentSampler(config, settings, device)
    methods = ("mse", "max" if args.a_min_max else "mse")
    task = QuantizationTask(
        **latent_task_parts(checkpoint, sampler, args.seed, methods),
        save_model_parts=lambda path: model_parts().save(path),
    )
    check(args, task)
    if classes:
        sampler.conditions = class_conditions(model_parts, classes)
    model_parts()

    def finish(folder: Path) -> None:
        (folder / "numpy").mkdir(exist_ok=True)
        save_npz(
            folder / "numpy" / f"{args.n_samples}-samples.npz",
            [folder / "img" / NAME.format(i) for i in range(args.n_samples)],
        )

    return SamplingRun(
        title=f"latent diffusion ({model_folder(args).name}), {settings.sampler}, {settings.steps} steps",
        args=args,
        device=device,
        task=task,
        draw=lambda network, indices, callback=None: sampler(network, indices, args.seed, callback),
        decode=lambda z: to_uint8_truncated(model_parts().decode(z)),
        denoiser=sampler.denoiser,
        total=args.n_samples,
        batch_size=args.batch_size,
        runs=Path(args.logdir) / model_folder(args).name / "samples",
        name=NAME,
        extends="n_samples",
        begin=lambda folder: write_text(
            folder / "sampling_config.yaml", yaml.safe_dump(printable(args), allow_unicode=True)
        ),
        finish=finish,
    )


def main(argv: list[str] | None = None) -> Path:
    return run(prepare(parse(argv)))
