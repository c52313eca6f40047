"""The bundled models: their sampling commands and their calibrated checkpoints."""

from dataclasses import replace
from pathlib import Path

from qdiff.errors import ConfigError
from qdiff.utils.resources import clone
from qdiff_cli.commands.sample_ddim import PixelCommand
from qdiff_cli.commands.sample_ldm import LatentCommand
from qdiff_cli.commands.txt2img import TextCommand
from qdiff_cli.options import RunOptions
from qdiff_cli.quantization_options import QuantizationOptions
from qdiff_cli.sampling_run import SamplingCommand

NAMES = ("emoji32", "emoji64", "emoji64-text")
SHOWN_PROMPTS = 8  # the lines of shown_prompts.txt
NUM_STEPS = 50


def folder_of(name: str) -> Path:
    """The folder of a bundled model."""
    return clone() / "models" / ("ddim" if name == "emoji32" else "ldm") / name


def quantization_options(name: str) -> QuantizationOptions:
    """The options of the calibrated checkpoints of a bundled model, except the bit width of the weights."""
    options = QuantizationOptions(ptq=True, quant_act=True, split=True)
    if name == "emoji32":
        return replace(options, a_sym=True)
    return replace(options, sm_abit=16) if name == "emoji64-text" else options


def sampling_command(name: str, images: int, seed: int = 0) -> SamplingCommand:
    """The sampling command of a bundled model in full precision, with 50 deterministic steps.

    Args:
        name: one of `NAMES`.
        images: the number of images. The text model rounds it up to a multiple of 8, the number of its prompts.
        seed: seed of the noise.

    Raises:
        ConfigError: there is no model of this name, or the packages were installed without the bundled models.
    """
    if name not in NAMES:
        raise ConfigError(f"{name}: expected one of {', '.join(NAMES)}")
    folder = folder_of(name)
    if name == "emoji32":
        return PixelCommand(
            config=clone() / "configs/emoji32.yml",
            use_pretrained=True,
            timesteps=NUM_STEPS,
            skip_type="quad",
            seed=seed,
            max_images=images,
        )
    if name == "emoji64":
        return LatentCommand(
            resume_base=folder, custom_steps=NUM_STEPS, eta=0.0, seed=seed, batch_size=16, n_samples=images
        )
    command = TextCommand(
        config=folder / "config.yaml",
        ckpt=folder,
        from_file=folder / "shown_prompts.txt",
        plms=True,
        ddim_steps=NUM_STEPS,
        seed=seed,
        n_iter=1,
        run=RunOptions(precision="full"),
    )
    return command.with_images(images)
