"""Sample images from text with Stable Diffusion v1, in full precision or quantized, calibrating it first if needed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import nn

from ldm.checkpoint import open_checkpoint
from ldm.conditions import calibration_prompt, cut_prompts, read_prompts, text_conditions
from ldm.config import LatentConfig
from ldm.diffusers_format import resolve_config
from ldm.encoders import ClassEmbedder, TextEmbedder
from ldm.samplers import LatentSamplerConfig
from ldm.sampling import LatentSampler, latent_task
from qdiff.errors import ConfigError
from qdiff.utils.files import write_text
from qdiff_cli.images import load_png, make_grid, save_png, to_uint8_truncated
from qdiff_cli.model_files import CHECKPOINT_HELP, holds_config, local_checkpoint
from qdiff_cli.options import Parser, Rule, RunOptions, add_run_options, positive, project_file, seed
from qdiff_cli.quantization_options import add_quantization_options
from qdiff_cli.runs import RunOutput
from qdiff_cli.sampling_run import SamplingCommand, SamplingRun

NAME = "{:05d}.png"
CONFIG = "configs/stable-diffusion/v1-inference.yaml"
CHECKPOINT = "models/ldm/stable-diffusion-v1/model.ckpt"
LAION400M = ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/text2img-large/model.ckpt")
GRID_IMAGES = 144  # the largest grid beside the images; a grid of all images of a long run would not fit into memory
SAMPLER_RULES = (
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


@dataclass(frozen=True, kw_only=True)
class TextCommand(SamplingCommand):
    """The command `txt2img.py` with the values of its options. `make_parser` describes them."""

    sampler_rules: ClassVar[tuple[Rule, ...]] = SAMPLER_RULES
    option_of_field: ClassVar[dict[str, str]] = {"timesteps": "--ddim_steps", "eta": "--ddim_eta"}

    prompt: str = "a painting of a virus monster playing guitar"
    from_file: Path | None = None
    outdir: str = "outputs/txt2img-samples"
    skip_grid: bool = False
    skip_save: bool = False
    ddim_steps: int = 50
    plms: bool = False
    dpm: bool = False
    laion400m: bool = False
    fixed_code: bool = False
    ddim_eta: float = 0.0
    n_iter: int = 2
    H: int | None = None
    W: int | None = None
    C: int | None = None
    f: int | None = None
    n_samples: int = 3
    n_rows: int | None = None
    scale: float = 7.5
    config: Path | None = None
    ckpt: Path = Path(CHECKPOINT)
    seed: int = 42
    no_grad_ckpt: bool = False
    run: RunOptions = field(default_factory=lambda: RunOptions(precision="autocast"))

    @classmethod
    def make_parser(cls) -> Parser:
        """The parser of the command's options."""
        parser = Parser((__doc__ or "").splitlines()[0])
        parser.add_argument("--prompt", default="a painting of a virus monster playing guitar", help="prompt")
        help_text = "file of prompts, one on each line, instead of --prompt"
        parser.add_argument("--from-file", dest="from_file", type=Path, help=help_text)
        parser.add_argument("--outdir", default="outputs/txt2img-samples", help="output folder")
        parser.add_argument("--skip_grid", action="store_true", help="do not write a grid")
        parser.add_argument("--skip_save", action="store_true", help="remove the images after the grid is written")
        parser.add_argument("--ddim_steps", type=positive, default=50, help="sampling steps")
        parser.add_argument("--plms", action="store_true", help="use PLMS (default: DDIM)")
        parser.add_argument("--dpm", action="store_true", help="use DPM-Solver++ 2M (default: DDIM)")
        parser.add_argument("--laion400m", action="store_true", help="use the 1p4B model of LAION")
        help_text = "start from the same noise samples for every prompt and round"
        parser.add_argument("--fixed_code", action="store_true", help=help_text)
        parser.add_argument("--ddim_eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 as DDPM")
        parser.add_argument("--n_iter", type=positive, default=2, help="rounds over all prompts")
        parser.add_argument("--H", type=positive, help="height in pixels (default: the model's; 512)")
        parser.add_argument("--W", type=positive, help="width in pixels (default: the model's; 512)")
        parser.add_argument("--C", type=positive, help="latent channels (default: the model's; 4)")
        parser.add_argument("--f", type=positive, help="pixels per latent pixel (default: the model's; 8)")
        help_text = "images of each prompt in a round, and the batch size"
        parser.add_argument("--n_samples", type=positive, default=3, help=help_text)
        parser.add_argument("--n_rows", type=positive, help="columns of the grid (default: n_samples)")
        parser.add_argument("--scale", type=float, default=7.5, help="guidance")
        help_text = f"YAML file of the model (default: {CONFIG}, or the settings in a folder of diffusers)"
        parser.add_argument("--config", type=project_file, help=help_text)
        parser.add_argument("--ckpt", type=project_file, default=CHECKPOINT, help=CHECKPOINT_HELP)
        parser.add_argument("--seed", type=seed, default=42, help="seed of the noise")
        help_text = "no effect; accepted because published commands have it"
        parser.add_argument("--no_grad_ckpt", action="store_true", help=help_text)
        add_run_options(parser, precision="autocast")
        add_quantization_options(parser)
        return parser

    def resolved(self) -> Self:
        """The same command with the files that it takes by default, or those of --laion400m.

        Raises:
            ConfigError: its samplers contradict each other.
        """
        if self.plms and self.dpm:
            raise ConfigError("--plms and --dpm: expected one of them")
        if self.laion400m:
            config, ckpt = map(project_file, LAION400M)
            return replace(self, config=config, ckpt=ckpt)
        if self.config is None and not holds_config(self.ckpt):
            return replace(self, config=project_file(CONFIG))
        return self

    @property
    def sampler_name(self) -> str:
        """The name of the sampler in `LATENT_SAMPLERS`."""
        return "plms" if self.plms else "dpm" if self.dpm else "ddim"

    def prompts(self) -> list[str]:
        """The prompts, in order."""
        return read_prompts(self.from_file) if self.from_file else [self.prompt]

    def _make_run(self) -> SamplingRun:
        device = self.run.apply()
        ckpt = local_checkpoint(self.ckpt)
        config = self._load_config(ckpt)
        settings = LatentSamplerConfig(self.sampler_name, self.ddim_steps, self.ddim_eta, self.scale).validate(config)
        prompts = self.prompts()
        checkpoint = cache(lambda: open_checkpoint(ckpt, config, self.quantization.cali_ckpt))
        model_parts = cache(lambda: checkpoint().model_parts().to(device))

        def prompt_of(index: int) -> str:
            return prompts[index // self.n_samples % len(prompts)]

        shape, repeat = self._latent_shape(config), self.n_samples if self.fixed_code else None
        conditions = text_conditions(model_parts, prompt_of)
        sampler = LatentSampler(config, settings, device, shape, conditions, repeat)
        own_prompts = text_conditions(model_parts, calibration_prompt(config.prompts))
        calibration_sampler = LatentSampler(config, settings, device, shape, own_prompts)
        task = latent_task(
            checkpoint, calibration_sampler, self.seed, save_model_parts=lambda path: model_parts().save(path)
        )
        quantization = self.quantization.resolve(task, self.seed)
        model_parts()  # a missing file is an error now
        total = self.n_iter * len(prompts) * self.n_samples
        guided = f"{self.sampler_name}, {self.ddim_steps} steps, guidance {self.scale:g}"
        return SamplingRun(
            title=f"text to image ({config.folder.name}), {guided}",
            settings=self.settings(),
            options=self.run,
            device=device,
            task=task,
            quantization=quantization,
            sample_latents=lambda network, indices, callback: sampler(network, indices, self.seed, callback),
            decode=lambda z: to_uint8_truncated(model_parts().decode(z)),
            denoiser=sampler.denoiser,
            total=total,
            batch_size=self.n_samples,
            output=RunOutput(
                runs=Path(self.outdir),
                images="samples",
                name=NAME,
                extends="n_iter",
                metadata=lambda index: self._metadata(index, prompt_of(index)),
                begin=lambda folder: write_cut_prompts(folder, model_parts().cond_stage_model, prompts),
                finish=lambda folder: self._write_grid(folder, total),
            ),
        )

    def _load_config(self, ckpt: Path) -> LatentConfig:
        config = resolve_config(self.config, ckpt)
        if config.conditioning is None or config.conditioning.kind is ClassEmbedder:
            message = f" {config.path}: a model without text; sample it with scripts/sample_diffusion_ldm.py"
            raise ConfigError(message, field="config")
        return config

    def _latent_shape(self, config: LatentConfig) -> tuple[int, int, int]:
        """(C, h, w) from --C, --H, --W and --f. ConfigError if the model cannot sample images of this shape."""
        model_factor = config.downsampling
        factor, channels = self.f or model_factor, self.C or config.channels
        height, width = self.H or config.image_size * factor, self.W or config.image_size * factor
        if factor != model_factor or channels != config.channels:
            raise ConfigError(
                f"--f {factor} --C {channels}: this model has a factor of {model_factor} "
                f"and {config.channels} latent channels"
            )
        unit = factor * 2 ** (len(config.unet.channel_mult) - 1)
        if height % unit or width % unit:
            raise ConfigError(f"--H {height} --W {width}: expected multiples of {unit}")
        return channels, height // factor, width // factor

    def _metadata(self, index: int, prompt: str) -> dict[str, str]:
        """The text chunks of an image: its prompt, seed, index and settings."""
        shown = {"steps": self.ddim_steps, "sampler": self.sampler_name, "scale": self.scale}
        shown["weight_bit"] = self.quantization.weight_bit if self.quantization.ptq else 32
        shown["act_bit"] = self.quantization.act_bit if self.quantization.quant_act else 32
        return {"prompt": prompt, "seed": str(self.seed), "index": str(index), "settings": json.dumps(shown)}

    def _write_grid(self, folder: Path, count: int) -> None:
        """Write a grid of the images; with --skip_save remove the images."""
        if self.skip_grid:
            return
        files = [folder / "samples" / NAME.format(i) for i in range(count)]
        shown = files if self.skip_save else files[:GRID_IMAGES]
        grid = make_grid(torch.stack([load_png(file) for file in shown]), self.n_rows or self.n_samples)
        save_png(folder / "grid-0000.png", grid)
        if self.skip_save:
            for file in files:
                file.unlink()

    def to_folder(self, folder: Path) -> Self:
        """The same command with another output folder."""
        return replace(self, outdir=str(folder))

    def with_images(self, count: int) -> Self:
        """The same command for this number of images, rounded up to a multiple of its prompts and rounds."""
        batches = len(self.prompts()) * self.n_iter
        return replace(self, n_samples=-(-count // batches))

    def with_num_steps(self, num_steps: int) -> Self:
        """The same command with another number of sampling steps."""
        return replace(self, ddim_steps=num_steps)


def write_cut_prompts(folder: Path, text: nn.Module | None, prompts: Sequence[str]) -> None:
    """Write `cut_prompts.txt` into a folder: the prompts that are too long, with the part that the model ignores."""
    if isinstance(text, TextEmbedder) and (cut := cut_prompts(text, dict.fromkeys(prompts))):
        lines = [f"prompt: {prompt}\ncut off: {rest}\n" for prompt, rest in cut.items()]
        write_text(folder / "cut_prompts.txt", "\n".join(lines))


def main(argv: list[str] | None = None) -> Path:
    """Run the command. Returns the folder of the images."""
    return TextCommand.parse(argv).make_run().execute()
