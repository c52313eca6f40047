"""Train a bundled model on emoji and write its EMA weights in half precision."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddim.config import TrainingConfig, training_config
from ddim.config import load_config as load_pixel_config
from ddim.data import load_emoji
from ddim.sampling import PixelSampler, PixelSamplerConfig
from ddim.schedule import make_prediction
from ddim.training import diffusion_loss, train
from ddim.unet import UNet
from ldm.checkpoint import UNET_PREFIX, LatentCheckpoint, LatentModelParts
from ldm.conditions import read_prompts
from ldm.config import LatentConfig
from ldm.config import load_config as load_latent_config
from ldm.sampling import LatentSampler, LatentSamplerConfig
from ldm.training import RandomCaptions, Reconstruction, TextModel, autoencoder_loss, encode_all
from ldm.unet import UNetModel
from qdiff.checkpoint import read_tensors
from qdiff.errors import ConfigError
from qdiff.utils.files import atomic_write, check_writable
from qdiff.utils.resources import clone
from qdiff_cli.images import make_grid, save_png, to_uint8, to_uint8_truncated
from qdiff_cli.options import Parser, add_device_options, positive, project_file, select_device
from qdiff_cli.running import log_to, setup_threads


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--config", type=project_file, default="configs/emoji32.yml", help="YAML file of the model")
    parser.add_argument("--part", default="unet", choices=["unet", "first_stage"], help="of a latent model")
    parser.add_argument(
        "--emoji", type=Path, required=True, help="the archive that `npm pack emoji-datasource-google@16.0.0` makes"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder to write (default: that of the model whose YAML file is given)"
    )
    parser.add_argument("--steps", type=positive, help="training steps (default: the configuration's)")
    add_device_options(parser)
    return parser.parse_args(argv)


def schedule(args: argparse.Namespace, values: dict) -> TrainingConfig:
    settings = training_config(values)
    torch.manual_seed(settings.seed)
    return replace(settings, steps=args.steps or settings.steps)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float().div(127.5).sub(1.0)


def write_half(path: Path, network: nn.Module, prefix: str = "") -> None:
    weights = {f"{prefix}{name}": tensor.half().contiguous().cpu() for name, tensor in network.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary)


def train_pixel(args: argparse.Namespace, device: torch.device) -> None:
    config = load_pixel_config(args.config)
    folder = output_folder(args, UNet(config.model), "")
    settings = schedule(args, config.training)
    data = to_float(load_emoji(args.emoji, config.model.image_size).images, device)
    loss = diffusion_loss(data, make_prediction(config.diffusion), settings)
    ema = train(UNet(config.model).to(device), loss, settings, folder / "unet.state")
    write_half(folder / "unet.safetensors", ema)
    sampler = PixelSampler(config, PixelSamplerConfig(skip_type="quad", timesteps=50), device)
    samples = to_uint8(sampler(ema.float().to(memory_format=torch.contiguous_format), range(64), seed=0))
    save_png(folder / "samples.png", make_grid(samples, columns=16, scale=2))


def train_first_stage(args: argparse.Namespace, config: LatentConfig, folder: Path, device: torch.device) -> None:
    settings = schedule(args, config.training["first_stage_training"])
    data = to_float(load_emoji(args.emoji, 64, flags=True).images, device)
    model_parts = LatentModelParts(replace(config, conditioning=None)).to(device)
    loss = autoencoder_loss(data, (config.channels, config.image_size, config.image_size), settings)
    model_parts.first_stage_model = train(
        Reconstruction(model_parts.first_stage_model), loss, settings, folder / "first_stage.state"
    ).autoencoder
    model_parts = model_parts.float().to(memory_format=torch.contiguous_format)
    model_parts.scale_factor = 1.0 / encode_all(model_parts.first_stage_model, data).std().item()
    model_parts.save(folder / "stages.safetensors")
    shown = data[:: max(1, len(data) // 16)][:16]
    pairs = torch.cat([shown, model_parts.decode(model_parts.encode(shown))])
    save_png(folder / "reconstructions.png", make_grid(to_uint8_truncated(pairs), columns=16))


def train_latent(args: argparse.Namespace, config: LatentConfig, folder: Path, device: torch.device) -> None:
    settings = schedule(args, config.training["training"])
    emoji = load_emoji(args.emoji, 64, flags=True)
    first = LatentCheckpoint(
        clone() / "models/ldm/emoji64/stages.safetensors", replace(config, conditioning=None)
    ).model_parts()
    model_parts = LatentModelParts(config).to(device)
    model_parts.first_stage_model, model_parts.scale_factor = first.first_stage_model.to(device), first.scale_factor
    latents = torch.cat([model_parts.encode(part) for part in to_float(emoji.images, device).split(64)])
    network, draw = UNetModel(config.unet).to(device), None
    if config.conditioning is not None:
        draw = RandomCaptions(model_parts.cond_stage_model, emoji.captions)
        network = TextModel(network, model_parts.cond_stage_model.transformer.text_model)
    ema = train(network, diffusion_loss(latents, config.prediction, settings, draw), settings, folder / "unet.state")
    ema = ema.float().to(memory_format=torch.contiguous_format)
    if draw:
        model_parts.cond_stage_model.transformer.text_model, ema = ema.text, ema.unet
    write_half(folder / "unet.safetensors", ema, UNET_PREFIX)
    model_parts.save(folder / "stages.safetensors")
    sampler = LatentSampler(config, LatentSamplerConfig("ddim", 50, 0.0, 1.0 if draw is None else 5.0), device)
    if draw:
        prompts = read_prompts(folder / "prompts.txt") if (folder / "prompts.txt").is_file() else ["red heart", "flag"]
        text = model_parts.cond_stage_model
        sampler.conditions = lambda indices: (
            text.encode([prompts[i % len(prompts)] for i in indices]),
            text.encode([""] * len(indices)),
        )
    save_png(
        folder / "samples.png",
        make_grid(to_uint8_truncated(model_parts.decode(sampler(ema, range(64), seed=0))), columns=16),
    )


def output_folder(args: argparse.Namespace, network: nn.Module, prefix: str) -> Path:
    """The folder to write, which is never that of another model.

    Raises:
        ConfigError: a folder with another `config.yaml`, or with weights of other shapes; no folder where there is none of its own.
    """
    pixel, own = args.config.suffix == ".yml", clone() / "configs/emoji32.yml"
    if args.output is None and pixel and args.config.resolve() != own.resolve():
        raise ConfigError(f"-o: expected a folder, as {args.config} is not the YAML file of a bundled model")
    folder = args.output or (clone() / "models/ddim/emoji32" if pixel else args.config.parent)
    config, weights = folder / "config.yaml", folder / "unet.safetensors"
    if config.is_file() and (pixel or config.read_bytes() != args.config.read_bytes()):
        raise ConfigError(
            f"-o {folder}: holds the model of another configuration, {config}; expected a folder of its own"
        )
    if weights.is_file():
        found = {name.removeprefix(prefix): tensor.shape for name, tensor in read_tensors(weights).items()}
        if found != {name: tensor.shape for name, tensor in network.state_dict().items()}:
            raise ConfigError(
                f"-o {folder}: holds the weights of another model, {weights}; expected a folder of its own"
            )
    check_writable(folder / "samples.png")
    return folder


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    setup_threads(args.threads)
    device = select_device(args.device)
    log_to(None, verbose=True)
    if not args.config.is_file():
        raise ConfigError(f"--config {args.config}: no such file")
    if args.config.suffix == ".yml":
        if "part" in args.typed:
            raise ConfigError("--part: acts only for a latent model")
        return train_pixel(args, device)
    config = load_latent_config(args.config)
    if not config.training:
        raise ConfigError(f"--config {args.config}: has no training section: it is not a bundled model")
    folder = output_folder(args, UNetModel(config.unet), UNET_PREFIX)
    return (train_first_stage if args.part == "first_stage" else train_latent)(args, config, folder, device)
