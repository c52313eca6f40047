"""Images from text with Stable Diffusion v1, in full precision or quantized, calibrating it first if needed."""

import argparse
import json
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import open_checkpoint
from ldm.conditions import calibration_prompt, cut_prompts, read_prompts, text_conditions
from ldm.config import LatentConfig, load_config
from ldm.encoders import ClassEmbedder, FrozenCLIPEmbedder
from ldm.sampling import LatentSampler, LatentSettings, latent_task_parts
from qdiff.errors import ConfigError
from qdiff.utils.files import write_text
from qdiff_cli.images import load_png, make_grid, save_png, to_uint8_truncated
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

NAME = "{:05d}.png"
CHECKPOINT = "models/ldm/stable-diffusion-v1/model.ckpt"
LAION400M = ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/text2img-large/model.ckpt")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a painting of a virus monster playing guitar")
    parser.add_argument(
        "--from-file", dest="from_file", type=Path, help="a file of prompts, one a line, instead of --prompt"
    )
    parser.add_argument("--outdir", default="outputs/txt2img-samples", help="output folder")
    parser.add_argument("--skip_grid", action="store_true", help="no grid")
    parser.add_argument("--skip_save", action="store_true", help="remove the single images once the grid is made")
    parser.add_argument("--ddim_steps", type=positive, default=50, help="sampling steps")
    parser.add_argument("--plms", action="store_true", help="PLMS (default: DDIM)")
    parser.add_argument("--dpm", action="store_true", help="DPM-Solver++ 2M")
    parser.add_argument("--laion400m", action="store_true", help="LAION's 1p4B model")
    parser.add_argument(
        "--fixed_code", action="store_true", help="the same starting noises for every prompt and iteration"
    )
    parser.add_argument("--ddim_eta", type=float, default=0.0, help="noise of DDIM")
    parser.add_argument("--n_iter", type=positive, default=2, help="rounds over all prompts")
    parser.add_argument("--H", type=positive, help="height in pixels (default: the model's; 512)")
    parser.add_argument("--W", type=positive, help="width in pixels (default: the model's; 512)")
    parser.add_argument("--C", type=positive, help="latent channels (default: the model's; 4)")
    parser.add_argument("--f", type=positive, help="pixels per latent pixel (default: the model's; 8)")
    parser.add_argument(
        "--n_samples", type=positive, default=3, help="images of each prompt in a round, and the batch size"
    )
    parser.add_argument("--n_rows", type=positive, help="columns of the grid (default: n_samples)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance")
    parser.add_argument(
        "--config",
        type=project_file,
        default="configs/stable-diffusion/v1-inference.yaml",
        help="YAML file of the model",
    )
    parser.add_argument("--ckpt", type=project_file, default=CHECKPOINT, help="the model's checkpoint or its folder")
    parser.add_argument("--seed", type=seed, default=42)
    parser.add_argument(
        "--no_grad_ckpt", action="store_true", help="accepted for the published commands; changes nothing"
    )
    add_run_options(parser, precision="autocast")
    add_quant_options(parser)
    return parser.parse_args(argv)


RULES = (
    Rule(
        "ddim_eta",
        lambda args: not (args.plms or args.dpm),
        "with DDIM: PLMS and DPM-Solver add no noise",
        lambda args, value: value == 0,
    ),
    Rule("prompt", lambda args: not args.from_file, "without --from-file, which has the prompts"),
    Rule("config ckpt", lambda args: not args.laion400m, "without --laion400m, which has its own"),
    Rule("n_rows skip_save", lambda args: not args.skip_grid, "without --skip_grid"),
)


def latent_shape(args: argparse.Namespace, config: LatentConfig) -> tuple[int, int, int]:
    """(C, h, w) from --C, --H, --W and --f; ConfigError where the model cannot make such a picture."""
    stages_factor = 2 ** (len(config.first_stage.params["ddconfig"]["ch_mult"]) - 1)
    factor, channels = args.f or stages_factor, args.C or config.channels
    height, width = args.H or config.image_size * factor, args.W or config.image_size * factor
    if factor != stages_factor or channels != config.channels:
        raise ConfigError(
            f"--f {factor} --C {channels}: this model has a factor of {stages_factor} and {config.channels} latent channels"
        )
    unit = factor * 2 ** (len(config.unet.channel_mult) - 1)
    if height % unit or width % unit:
        raise ConfigError(f"--H {height} --W {width}: expected multiples of {unit}")
    return channels, height // factor, width // factor


def load_text_config(args: argparse.Namespace) -> LatentConfig:
    if args.laion400m:
        args.config, args.ckpt = map(project_file, LAION400M)
    config = load_config(args.config)
    if config.conditioning is None or config.conditioning.kind is ClassEmbedder:
        raise ConfigError(
            f"--config {args.config}: a model without text; sample it with scripts/sample_diffusion_ldm.py"
        )
    return config


GRID_IMAGES = 144  # at most, where the images themselves are kept: a grid of a long run would not fit into memory


def write_grid(folder: Path, count: int, columns: int, keep: bool) -> None:
    files = [folder / "samples" / NAME.format(i) for i in range(count)]
    shown = files[:GRID_IMAGES] if keep else files
    save_png(folder / "grid-0000.png", make_grid(torch.stack([load_png(file) for file in shown]), columns))
    if not keep:
        for file in files:
            file.unlink()


def write_cut_prompts(folder: Path, text: nn.Module | None, prompts: list[str]) -> None:
    """`cut_prompts.txt` beside the images: the prompts that are too long, and what the model does not see of each."""
    if isinstance(text, FrozenCLIPEmbedder) and (cut := cut_prompts(text, dict.fromkeys(prompts))):
        lines = [f"prompt: {prompt}\ncut off: {rest}\n" for prompt, rest in cut.items()]
        write_text(folder / "cut_prompts.txt", "\n".join(lines))


def prepare(args: argparse.Namespace) -> SamplingRun:
    """The job that the options describe, checked."""
    setup_threads(args.threads)
    device = select_device(args.device)
    if args.plms and args.dpm:
        raise ConfigError("--plms and --dpm: expected one of them")
    check_typed(args, RULES)
    config = load_text_config(args)
    name = "plms" if args.plms else "dpm" if args.dpm else "ddim"
    settings = LatentSettings(name, args.ddim_steps, args.ddim_eta, args.scale).validate(config)
    prompts = read_prompts(args.from_file) if args.from_file else [args.prompt]
    checkpoint = cache(lambda: open_checkpoint(args.ckpt, config, args.cali_ckpt))
    model_parts = cache(lambda: checkpoint().model_parts().to(device))

    def prompt_of(index: int) -> str:
        return prompts[index // args.n_samples % len(prompts)]

    shape, repeat = latent_shape(args, config), args.n_samples if args.fixed_code else None
    sampler = LatentSampler(config, settings, device, shape, text_conditions(model_parts, prompt_of), repeat)
    drawer = LatentSampler(
        config, settings, device, shape, text_conditions(model_parts, calibration_prompt(config.path))
    )
    task = QuantizationTask(
        **latent_task_parts(checkpoint, drawer, args.seed, ("mse", "mse")),
        save_model_parts=lambda path: model_parts().save(path),
    )
    check(args, task)
    model_parts()

    def metadata(index: int) -> dict[str, str]:
        shown = {
            "steps": args.ddim_steps,
            "sampler": name,
            "scale": args.scale,
            "weight_bit": args.weight_bit if args.ptq else 32,
        }
        shown["act_bit"] = args.act_bit if args.quant_act else 32
        return {"prompt": prompt_of(index), "seed": str(args.seed), "index": str(index), "settings": json.dumps(shown)}

    total = args.n_iter * len(prompts) * args.n_samples
    return SamplingRun(
        title=f"text to image ({config.path.parent.name}), {name}, {args.ddim_steps} steps, guidance {args.scale:g}",
        args=args,
        device=device,
        task=task,
        draw=lambda network, indices, callback=None: sampler(network, indices, args.seed, callback),
        decode=lambda z: to_uint8_truncated(model_parts().decode(z)),
        denoiser=sampler.denoiser,
        total=total,
        batch_size=args.n_samples,
        runs=Path(args.outdir),
        images="samples",
        name=NAME,
        extends="n_iter",
        metadata=metadata,
        begin=lambda folder: write_cut_prompts(folder, model_parts().cond_stage_model, prompts),
        finish=lambda folder: None
        if args.skip_grid
        else write_grid(folder, total, args.n_rows or args.n_samples, keep=not args.skip_save),
    )


def main(argv: list[str] | None = None) -> Path:
    return run(prepare(parse(argv)))
