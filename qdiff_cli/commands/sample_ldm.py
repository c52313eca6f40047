"""Sample images from a latent diffusion model, in full precision or quantized, calibrating it first if needed."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Self

import yaml

from ldm.checkpoint import open_checkpoint
from ldm.conditions import class_conditions, parse_classes
from ldm.config import LatentConfig, load_config
from ldm.diffusers_format import resolve_config
from ldm.encoders import ClassEmbedder
from ldm.samplers import LatentSamplerConfig
from ldm.sampling import LatentSampler, latent_task
from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.errors import ConfigError
from qdiff.utils.files import write_text
from qdiff.utils.resources import find
from qdiff_cli.images import save_npz, to_uint8_truncated
from qdiff_cli.model_files import CHECKPOINT_HELP, local_checkpoint
from qdiff_cli.options import Parser, Rule, add_run_options, positive, project_file, seed
from qdiff_cli.quantization_options import add_quantization_options
from qdiff_cli.runs import RunOutput
from qdiff_cli.sampling_run import SamplingCommand, SamplingRun

NAME = "sample_{:06d}.png"
CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors", ".pth", ".pt")
SAMPLER_RULES = (
    Rule(
        "eta",
        lambda args: not (args.dpm or args.vanilla_sample),
        "with DDIM: --dpm adds no noise, --vanilla_sample that of DDPM",
        lambda args, value: value == (0 if args.dpm else 1),
    ),
    Rule(
        "custom_steps",
        lambda args: not args.vanilla_sample,
        "without --vanilla_sample, which takes every time step",
    ),
)


@dataclass(frozen=True, kw_only=True)
class LatentCommand(SamplingCommand):
    """The command `sample_diffusion_ldm.py` with the values of its options. `make_parser` describes them."""

    sampler_rules: ClassVar[tuple[Rule, ...]] = SAMPLER_RULES
    option_of_field: ClassVar[dict[str, str]] = {"timesteps": "--custom_steps", "config": "--resume_base"}

    resume_base: Path
    n_samples: int = 50_000
    eta: float = 1.0
    vanilla_sample: bool = False
    dpm: bool = False
    logdir: str = "results"
    custom_steps: int = 50
    batch_size: int = 10
    classes: str | None = None
    scale: float = 1.0
    overrides: tuple[str, ...] | list[str] = ()

    @classmethod
    def make_parser(cls) -> Parser:
        """The parser of the command's options."""
        parser = Parser((__doc__ or "").splitlines()[0])
        parser.add_argument(
            "-r", "--resume_base", type=project_file, required=True, metavar="CKPT", help=CHECKPOINT_HELP
        )
        parser.add_argument("-n", "--n_samples", type=positive, default=50000, help="number of images")
        parser.add_argument("-e", "--eta", type=float, default=1.0, help="noise of DDIM: 0 none, 1 as DDPM")
        help_text = "use ancestral sampling over every time step"
        parser.add_argument("-v", "--vanilla_sample", action="store_true", help=help_text)
        parser.add_argument("--dpm", action="store_true", help="use DPM-Solver++ 2M")
        parser.add_argument("--seed", type=seed, required=True, help="seed of the noise")
        parser.add_argument("-l", "--logdir", default="results", help="output folder")
        help_text = "sampling steps; DDIM takes every k-th of 1000 time steps, so 400 becomes 500"
        parser.add_argument("-c", "--custom_steps", type=positive, default=50, help=help_text)
        parser.add_argument("--batch_size", type=positive, default=10, help="images of one batch")
        help_text = "class numbers of a class-conditional model, such as 25,187, used in turn (default: all)"
        parser.add_argument("--classes", help=help_text)
        parser.add_argument("--scale", type=float, default=1.0, help="guidance of a class-conditional model; 1: none")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the YAML file")
        add_run_options(parser)
        add_quantization_options(parser)
        return parser

    def resolved(self) -> Self:
        """The same command. ConfigError if its samplers contradict each other."""
        if self.vanilla_sample and self.dpm:
            raise ConfigError("--vanilla_sample and --dpm: expected one of them")
        return self

    def _make_run(self) -> SamplingRun:
        device = self.run.apply()
        folder, path = self._model_folder(), local_checkpoint(self.resume_base)
        config = self._load_config(folder, path)
        settings, classes = self._sampler_settings(config), self._class_numbers(config)
        checkpoint = cache(lambda: open_checkpoint(path, config, self.quantization.cali_ckpt))
        model_parts = cache(lambda: checkpoint().model_parts().to(device))
        sampler = LatentSampler(config, settings, device)
        task = latent_task(checkpoint, sampler, self.seed, lambda path: model_parts().save(path))
        quantization = self.quantization.resolve(task, self.seed)
        if classes:
            sampler.conditions = class_conditions(model_parts, classes)
        model_parts()  # a missing file is an error now
        return SamplingRun(
            title=f"latent diffusion ({folder.name}), {settings.sampler}, {settings.timesteps} steps",
            settings=self.settings(),
            options=self.run,
            device=device,
            task=task,
            quantization=quantization,
            sample_latents=lambda network, indices, callback: sampler(network, indices, self.seed, callback),
            decode=lambda z: to_uint8_truncated(model_parts().decode(z)),
            denoiser=sampler.denoiser,
            total=self.n_samples,
            batch_size=self.batch_size,
            output=RunOutput(
                runs=Path(self.logdir) / folder.name / "samples",
                name=NAME,
                extends="n_samples",
                begin=self._write_settings,
                finish=self._write_npz,
            ),
        )

    def _load_config(self, folder: Path, path: Path) -> LatentConfig:
        """The configuration of the model in `folder`; `path` is its checkpoint."""
        if DiffusersFolder.find(path) is None:
            return load_config(config_file(folder), list(self.overrides))
        if self.overrides:
            found = " ".join(self.overrides)
            raise ConfigError(f"{found}: replaces settings of a YAML file, but {path} is a folder of diffusers")
        return resolve_config(None, path)

    def _sampler_settings(self, config: LatentConfig) -> LatentSamplerConfig:
        sampler = "vanilla" if self.vanilla_sample else "dpm" if self.dpm else "ddim"
        eta = 0.0 if self.dpm else self.eta
        return LatentSamplerConfig(sampler, self.custom_steps, eta, self.scale).validate(config)

    def _class_numbers(self, config: LatentConfig) -> list[int]:
        """The classes to sample. ConfigError if the model has no classes, or not all of these classes."""
        conditioning = config.conditioning
        if conditioning is not None and conditioning.kind is ClassEmbedder:
            count = int(conditioning.params.get("n_classes", 1000)) - 1  # the last one is "no class"
            return parse_classes(self.classes, count)
        if conditioning is not None:
            raise ConfigError(f"{config.path}: a model with text; sample it with scripts/txt2img.py")
        if self.classes or self.scale != 1.0:
            raise ConfigError(f"--classes, --scale: {config.path} is an unconditional model")
        return []

    def _model_folder(self) -> Path:
        """The folder of the model: the given folder, whose name may have a dot, or the folder of the given file."""
        path = self.resume_base
        is_folder = path.is_dir() or not (path.is_file() or path.suffix in CHECKPOINT_SUFFIXES)
        return path if is_folder else path.parent

    def _write_settings(self, folder: Path) -> None:
        """Write the values of all options beside the images."""
        write_text(folder / "sampling_config.yaml", yaml.safe_dump(self.settings(), allow_unicode=True))

    def _write_npz(self, folder: Path) -> None:
        """Write all images to a `.npz` file."""
        (folder / "numpy").mkdir(exist_ok=True)
        files = [folder / "img" / NAME.format(i) for i in range(self.n_samples)]
        save_npz(folder / "numpy" / f"{self.n_samples}-samples.npz", files)

    def to_folder(self, folder: Path) -> Self:
        """The same command with another output folder."""
        return replace(self, logdir=str(folder))

    def with_images(self, count: int) -> Self:
        """The same command for this number of images."""
        return replace(self, n_samples=count)

    def with_num_steps(self, num_steps: int) -> Self:
        """The same command with another number of sampling steps."""
        return replace(self, custom_steps=num_steps)


def config_file(folder: Path) -> Path:
    """The YAML file of a model: `config.yaml` in its folder, else the project's file for a folder of this name."""
    file = folder / "config.yaml"
    return file if file.is_file() else find(Path("models/ldm", folder.absolute().name, "config.yaml"))


def main(argv: list[str] | None = None) -> Path:
    """Run the command. Returns the folder of the images."""
    return LatentCommand.parse(argv).make_run().execute()
