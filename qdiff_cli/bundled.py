"""The bundled models: their sampling commands, and each as one kind of thing with the noises of some pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import nearest_rounding
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.utils.resources import clone
from qdiff_cli.sampling_run import SamplingRun, prepare

NAMES = ("emoji32", "emoji64", "emoji64-text")
SHOWN_PROMPTS = 8


def folder_of(name: str) -> Path:
    return clone() / "models" / ("ddim" if name == "emoji32" else "ldm") / name


def quantization_options(name: str) -> list[str]:
    """The options of the bundled calibrated checkpoints, but for the width of the weights."""
    return {
        "emoji32": ["--quant_act", "--a_sym", "--split"],
        "emoji64": ["--quant_act", "--split"],
        "emoji64-text": ["--quant_act", "--split", "--sm_abit", "16"],
    }[name]


def sampling_command(name: str, images: int, seed: int = 0) -> list[str]:
    """The sampling command of a model in full precision: 50 deterministic steps."""
    folder = str(folder_of(name))
    if name == "emoji32":
        config = str(clone() / "configs/emoji32.yml")
        words = f"--use_pretrained --timesteps 50 --skip_type quad --seed {seed} --max_images {images}"
        return ["sample_diffusion_ddim.py", "--config", config, *words.split()]
    if name == "emoji64":
        return [
            "sample_diffusion_ldm.py",
            "-r",
            folder,
            *f"-c 50 -e 0 --seed {seed} --batch_size 16 -n {images}".split(),
        ]
    each = -(-images // SHOWN_PROMPTS)
    words = f"--plms --precision full --seed {seed} --n_iter 1 --n_samples {each}"
    prompts = ["--from-file", f"{folder}/shown_prompts.txt"]
    return ["txt2img.py", "--config", f"{folder}/config.yaml", "--ckpt", folder, *prompts, *words.split()]


@dataclass(frozen=True)
class BundledModel:
    """A bundled model with the noises (and prompts) of `job.total` pictures, all in one batch."""

    name: str
    job: SamplingRun
    model: nn.Module

    @property
    def folder(self) -> Path:
        return folder_of(self.name)

    def denoiser(self, network: nn.Module) -> Callable:
        return self.job.denoiser(network, range(self.job.total))

    def sample(self, network: nn.Module, callback: Callable | None = None) -> Tensor:
        return self.job.sample(network, range(self.job.total), callback)

    def rows(self, recipe: CalibrationConfig) -> CalibrationData:
        return self.job.task.generate(self.model, recipe).select(recipe.steps, recipe.samples)

    def nearest(self, quant: QuantConfig, recipe: CalibrationConfig) -> nn.Module:
        """The baseline: the widths of `quant` by nearest rounding and min-max ranges."""
        return nearest_rounding(self.model, self.job.task.family, quant, recipe, self.rows(recipe))


def load_bundled(name: str, images: int, device: torch.device) -> BundledModel:
    job = prepare([*sampling_command(name, images), "--device", device.type, "--threads", str(torch.get_num_threads())])
    return BundledModel(name, job, job.task.load().to(device).eval())
