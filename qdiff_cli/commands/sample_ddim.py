"""Sample images from a pixel-space DDPM, in full precision or quantized, calibrating it first if needed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from ddim.diffusers_format import resolve_config
from ddim.samplers import PIXEL_SAMPLERS, PixelSamplerConfig
from ddim.sampling import PixelSampler, pixel_task
from qdiff.errors import ConfigError
from qdiff.samplers import Sampler
from qdiff_cli.images import to_uint8
from qdiff_cli.model_files import CHECKPOINT_HELP, local_checkpoint
from qdiff_cli.options import ParsedArgs, Parser, Rule, add_run_options, positive, project_file, seed
from qdiff_cli.quantization_options import add_quantization_options
from qdiff_cli.runs import RunOutput
from qdiff_cli.sampling_run import SamplingCommand, SamplingRun


def _sampler(args: ParsedArgs) -> Sampler[PixelSamplerConfig]:
    """The sampler that --sample_type names; make_calibration_set.py has no default for it."""
    return PIXEL_SAMPLERS.get(args.sample_type or PIXEL_SAMPLERS.names()[0])


SAMPLER_RULES = (
    Rule(
        "eta",
        lambda args: _sampler(args).uses_eta,
        "with a --sample_type that takes it, such as generalized (DDIM)",
        lambda args, value: value == 0 and not _sampler(args).stochastic,
    ),
    Rule(
        "skip_type",
        lambda args: _sampler(args).uses_spacing,
        "with another --sample_type: this one has a spacing of its own (that of dpm_solver is uniform)",
        lambda args, value: value == "uniform",
    ),
)


@dataclass(frozen=True, kw_only=True)
class PixelCommand(SamplingCommand):
    """The command `sample_diffusion_ddim.py` with the values of its options. `make_parser` describes them."""

    sampler_rules: ClassVar[tuple[Rule, ...]] = SAMPLER_RULES
    option_of_field: ClassVar[dict[str, str]] = {"timesteps": "--timesteps"}

    config: Path | None = None
    logdir: str = "results"
    use_pretrained: bool = False
    seed: int = 1234
    sample_type: str = "generalized"
    skip_type: str = "uniform"
    timesteps: int = 1000
    eta: float = 0.0
    max_images: int = 50_000
    batch_size: int | None = None
    ckpt: Path | None = None

    @classmethod
    def make_parser(cls) -> Parser:
        """The parser of the command's options."""
        parser = Parser((__doc__ or "").splitlines()[0])
        help_text = "YAML file of the model; a folder of diffusers (--ckpt) does not need it"
        parser.add_argument("--config", type=project_file, help=help_text)
        parser.add_argument("-l", "--logdir", default="results", help="output folder")
        parser.add_argument(
            "--use_pretrained", action="store_true", help="use the weights that the configuration names"
        )
        parser.add_argument("--seed", type=seed, default=1234, help="seed of the noise")
        parser.add_argument("--sample_type", default="generalized", choices=PIXEL_SAMPLERS.names(), help="sampler")
        help_text = "spacing of the time steps"
        parser.add_argument("--skip_type", default="uniform", choices=["uniform", "quad"], help=help_text)
        parser.add_argument("--timesteps", type=positive, default=1000, help="sampling steps")
        parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 as DDPM")
        parser.add_argument("--max_images", type=positive, default=50000, help="number of images")
        help_text = "images of one batch (default: the value of the configuration)"
        parser.add_argument("--batch_size", type=positive, help=help_text)
        parser.add_argument("--ckpt", type=project_file, help=CHECKPOINT_HELP)
        add_run_options(parser)
        add_quantization_options(parser)
        return parser

    def _make_run(self) -> SamplingRun:
        device = self.run.apply()
        ckpt = None if self.ckpt is None else local_checkpoint(self.ckpt)
        config = resolve_config(self.config, ckpt)
        settings = PixelSamplerConfig(self.sample_type, self.skip_type, self.timesteps, self.eta)
        sampler = PixelSampler(config, settings.validate(config.diffusion), device)
        if not (self.ckpt or self.use_pretrained or self.quantization.cali_ckpt):
            raise ConfigError("no weights: expected --use_pretrained, --ckpt FILE or --cali_ckpt FILE")
        task = pixel_task(config, ckpt, sampler, self.seed)
        return SamplingRun(
            title=f"pixel DDPM ({config.path.stem}), {self.sample_type}, {self.timesteps} {self.skip_type} steps",
            settings=self.settings(),
            options=self.run,
            device=device,
            task=task,
            quantization=self.quantization.resolve(task, self.seed),
            sample_latents=lambda network, indices, callback: sampler(network, indices, self.seed, callback),
            decode=to_uint8,
            denoiser=sampler.denoiser,
            total=self.max_images,
            batch_size=self.batch_size or config.batch_size,
            output=RunOutput(Path(self.logdir) / "samples"),
        )

    def to_folder(self, folder: Path) -> Self:
        """The same command with another output folder."""
        return replace(self, logdir=str(folder))

    def with_images(self, count: int) -> Self:
        """The same command for this number of images."""
        return replace(self, max_images=count)

    def with_num_steps(self, num_steps: int) -> Self:
        """The same command with another number of sampling steps."""
        return replace(self, timesteps=num_steps)


def main(argv: list[str] | None = None) -> Path:
    """Run the command. Returns the folder of the images."""
    return PixelCommand.parse(argv).make_run().execute()
