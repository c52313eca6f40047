"""Train a bundled model on emoji and write its EMA weights in half precision."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddim.config import TrainingConfig, training_config
from ddim.config import load_config as load_pixel_config
from ddim.data import load_emoji
from ddim.samplers import PixelSamplerConfig
from ddim.sampling import PixelSampler
from ddim.schedule import make_prediction
from ddim.training import diffusion_loss, train
from ddim.unet import UNet
from ldm.autoencoder import AutoencoderKL
from ldm.checkpoint import UNET_PREFIX, LatentCheckpoint, LatentModelParts
from ldm.conditions import read_prompts, text_conditions
from ldm.config import LatentConfig
from ldm.config import load_config as load_latent_config
from ldm.encoders import FrozenCLIPEmbedder
from ldm.samplers import LatentSamplerConfig
from ldm.sampling import LatentSampler
from ldm.training import RandomCaptions, Reconstruction, TextModel, autoencoder_loss, encode_all
from ldm.unet import UNetModel
from qdiff.checkpoint import read_tensors
from qdiff.errors import ConfigError
from qdiff.utils.files import atomic_write, check_writable
from qdiff.utils.resources import clone
from qdiff_cli.images import make_grid, save_png, to_uint8, to_uint8_truncated
from qdiff_cli.options import DeviceOptions, Parser, add_device_options, positive, project_file
from qdiff_cli.runs import log_to

SAMPLES, COLUMNS = 64, 16  # images and columns of the picture of samples
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class TrainOptions:
    """The options of train_bundled.py. `parse` describes them."""

    config: Path
    part: str
    emoji: Path
    output: Path | None
    steps: int | None
    device: DeviceOptions

    @property
    def is_pixel(self) -> bool:
        """Whether the YAML file describes a pixel model."""
        return self.config.suffix == ".yml"


def parse(argv: Sequence[str] | None) -> TrainOptions:
    """Parse and check the arguments of the command; None: those of this process."""
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=project_file, default="configs/emoji32.yml", help="YAML file of the model")
    parser.add_argument(
        "--part", default="unet", choices=["unet", "first_stage"], help="part of a latent model to train"
    )
    help_text = "archive that `npm pack emoji-datasource-google@16.0.0` writes"
    parser.add_argument("--emoji", type=Path, required=True, help=help_text)
    help_text = "output folder (default: the folder of the bundled model)"
    parser.add_argument("-o", "--output", type=Path, help=help_text)
    parser.add_argument("--steps", type=positive, help="training steps (default: the value of the configuration)")
    add_device_options(parser)
    args = parser.parse_args(argv)
    options = args.make(TrainOptions, device=args.make(DeviceOptions))
    if not options.config.is_file():
        raise ConfigError(f"--config {options.config}: no such file")
    if options.is_pixel and "part" in args.typed:
        raise ConfigError("--part: acts only for a latent model")
    return options


def training_settings(options: TrainOptions, values: dict[str, Any]) -> TrainingConfig:
    """Read a training section of the configuration, with the steps of --steps, and seed this process."""
    settings = training_config(values)
    torch.manual_seed(settings.seed)
    return replace(settings, steps=options.steps or settings.steps)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.to(device).float().div(127.5).sub(1.0)


def contiguous(network: M) -> M:
    """Convert a network to float32 in contiguous memory."""
    return network.float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # not in the stubs


def write_half(path: Path, network: nn.Module, prefix: str = "") -> None:
    """Write the weights of a network in half precision, with `prefix` before their names."""
    weights = {f"{prefix}{name}": tensor.half().contiguous().cpu() for name, tensor in network.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary)


def train_pixel(options: TrainOptions, device: torch.device) -> None:
    """Train the UNet of a pixel model."""
    config = load_pixel_config(options.config)
    folder = output_folder(options, UNet(config.model), "")
    settings = training_settings(options, config.training)
    data = to_float(load_emoji(options.emoji, config.model.image_size).images, device)
    loss = diffusion_loss(data, make_prediction(config.diffusion), settings)
    ema = train(UNet(config.model).to(device), loss, settings, folder / "unet.state")
    write_half(folder / "unet.safetensors", ema)
    sampler = PixelSampler(config, PixelSamplerConfig(skip_type="quad", timesteps=50), device)
    samples = to_uint8(sampler(contiguous(ema), range(SAMPLES), seed=0))
    save_png(folder / "samples.png", make_grid(samples, columns=COLUMNS, scale=2))


def train_first_stage(options: TrainOptions, config: LatentConfig, folder: Path, device: torch.device) -> None:
    """Train the autoencoder of a latent model."""
    settings = training_settings(options, config.training["first_stage_training"])
    data = to_float(load_emoji(options.emoji, 64, flags=True).images, device)
    model_parts = LatentModelParts(replace(config, conditioning=None)).to(device)
    first_stage = model_parts.first_stage_model
    assert isinstance(first_stage, AutoencoderKL)  # of the bundled models
    loss = autoencoder_loss(data, (config.channels, config.image_size, config.image_size), settings)
    trained = train(Reconstruction(first_stage), loss, settings, folder / "first_stage.state").autoencoder
    model_parts.first_stage_model = trained
    model_parts = contiguous(model_parts)
    model_parts.scale_factor = 1.0 / encode_all(trained, data).std().item()
    model_parts.save(folder / "stages.safetensors")
    shown = data[:: max(1, len(data) // COLUMNS)][:COLUMNS]
    pairs = torch.cat([shown, model_parts.decode(model_parts.encode(shown))])
    save_png(folder / "reconstructions.png", make_grid(to_uint8_truncated(pairs), columns=COLUMNS))


def train_latent(options: TrainOptions, config: LatentConfig, folder: Path, device: torch.device) -> None:
    """Train the UNet of a latent model, and its text tower if it has one."""
    settings = training_settings(options, config.training["training"])
    emoji = load_emoji(options.emoji, 64, flags=True)
    autoencoder_file = clone() / "models/ldm/emoji64/stages.safetensors"
    first = LatentCheckpoint(autoencoder_file, replace(config, conditioning=None)).model_parts()
    model_parts = LatentModelParts(config).to(device)
    model_parts.first_stage_model, model_parts.scale_factor = first.first_stage_model.to(device), first.scale_factor
    latents = torch.cat([model_parts.encode(part) for part in to_float(emoji.images, device).split(64)])
    unet, text = UNetModel(config.unet).to(device), model_parts.cond_stage_model
    sampler = LatentSampler(config, LatentSamplerConfig("ddim", 50, 0.0, 1.0 if text is None else 5.0), device)
    state = folder / "unet.state"
    ema: nn.Module
    if text is None:
        loss = diffusion_loss(latents, config.prediction, settings)
        ema = contiguous(train(unet, loss, settings, state))
    else:
        assert isinstance(text, FrozenCLIPEmbedder)  # of the bundled models
        loss = diffusion_loss(latents, config.prediction, settings, RandomCaptions(text, emoji.captions))
        both = contiguous(train(TextModel(unet, text.transformer.text_model), loss, settings, state))
        text.transformer.text_model.load_state_dict(both.text.state_dict())
        ema = both.unet
        prompts_file = folder / "prompts.txt"
        prompts = read_prompts(prompts_file) if prompts_file.is_file() else ["red heart", "flag"]
        sampler.conditions = text_conditions(lambda: model_parts, lambda i: prompts[i % len(prompts)])
    write_half(folder / "unet.safetensors", ema, UNET_PREFIX)
    model_parts.save(folder / "stages.safetensors")
    samples = to_uint8_truncated(model_parts.decode(sampler(ema, range(SAMPLES), seed=0)))
    save_png(folder / "samples.png", make_grid(samples, columns=COLUMNS))


def output_folder(options: TrainOptions, network: nn.Module, prefix: str) -> Path:
    """The output folder. Another model in it is never overwritten.

    Args:
        options: the options of train_bundled.py.
        network: the network that will be written.
        prefix: stands before the names of its weights in the file.

    Raises:
        ConfigError: the folder has another `config.yaml`, or weights of other shapes; or no folder is given, and the
            YAML file is not that of a bundled model.
    """
    bundled = clone() / "configs/emoji32.yml"
    if options.output is None and options.is_pixel and options.config.resolve() != bundled.resolve():
        raise ConfigError(f"-o: expected a folder, as {options.config} is not the YAML file of a bundled model")
    default = clone() / "models/ddim/emoji32" if options.is_pixel else options.config.parent
    folder = options.output or default
    config, weights = folder / "config.yaml", folder / "unet.safetensors"
    if config.is_file() and (options.is_pixel or config.read_bytes() != options.config.read_bytes()):
        raise ConfigError(
            f"-o {folder}: holds the model of another configuration, {config}; expected a folder of its own"
        )
    if weights.is_file():
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in read_tensors(weights).items()}
        if shapes != {name: tensor.shape for name, tensor in network.state_dict().items()}:
            raise ConfigError(
                f"-o {folder}: holds the weights of another model, {weights}; expected a folder of its own"
            )
    check_writable(folder / "samples.png")
    return folder


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    device = options.device.apply()
    log_to(None, verbose=True)
    if options.is_pixel:
        train_pixel(options, device)
        return
    config = load_latent_config(options.config)
    if not config.training:
        raise ConfigError(f"--config {options.config}: has no training section: it is not a bundled model")
    folder = output_folder(options, UNetModel(config.unet), UNET_PREFIX)
    train_part = train_first_stage if options.part == "first_stage" else train_latent
    train_part(options, config, folder, device)
