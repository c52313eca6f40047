"""Full-precision weights of the pixel family: public checkpoints, downloaded once and checked, or bundled files."""

from pathlib import Path

from torch import nn

from ddim.config import PixelConfig
from ddim.diffusers_format import read_unet
from ddim.unet import UNet
from qdiff.checkpoint import load_into, read_tensors
from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.errors import ConfigError
from qdiff.utils.download import cache_root, fetch
from qdiff.utils.resources import find, is_clone

HOST = "https://heibox.uni-heidelberg.de/f"
# EMA weights of the "pytorch_diffusion" release: from the name to (address, path in the cache, md5).
PUBLIC = {
    "ema_cifar10": (
        "2e4f01e2d9ee49bab1d5",
        "ema_diffusion_cifar10_model/model-790000.ckpt",
        "1fa350b952534ae442b1d5235cce5cd3",
    ),
    "ema_lsun_bedroom": (
        "b95206528f384185889b",
        "ema_diffusion_lsun_bedroom_model/model-2388000.ckpt",
        "1921fa46b66a3665e450e42f36c2720f",
    ),
    "ema_lsun_cat": (
        "0701aac3aa69457bbe34",
        "ema_diffusion_lsun_cat_model/model-1761000.ckpt",
        "646f23f4821f2459b8bafc57fd824558",
    ),
    "ema_lsun_church": (
        "44ccb50ef3c6436db52e",
        "ema_diffusion_lsun_church_model/model-4432000.ckpt",
        "fdc68a23938c2397caba4a260bc2445f",
    ),
}


def load_unet(config: PixelConfig, checkpoint: str | Path | None) -> nn.Module:
    """Load the full-precision UNet.

    Args:
        config: the configuration of the model.
        checkpoint: a local file or a folder of diffusers. None stands for the pretrained weights that the configuration
            names.

    Raises:
        CheckpointError: the file does not hold this network.
        ConfigError: the configuration names no pretrained weights, or they do not exist.
    """
    path = Path(checkpoint) if checkpoint else pretrained_file(config)
    folder = DiffusersFolder.find(path)
    state = read_tensors(path) if folder is None else read_unet(folder)
    return load_into(UNet(config.model), state, path).eval()


def pretrained_file(config: PixelConfig) -> Path:
    """Return the file with the weights that the configuration names, and download a public checkpoint if necessary.

    Raises:
        ConfigError: the configuration names no pretrained weights, or they do not exist.
    """
    name = config.pretrained
    if name is None:
        raise ConfigError(
            f": {config.path} names no pretrained weights; expected a checkpoint file (ckpt)", field="use_pretrained"
        )
    if name in PUBLIC:
        address, place, md5 = PUBLIC[name]
        return fetch(f"{HOST}/{address}/?dl=1", cache_root() / "diffusion_models_converted" / place, md5)
    path = find(name)
    if not path.is_file():
        hint = "; the bundled models are part of a clone of the repository, not of the installed package"
        message = f": {path}: no such file (named by {config.path})"
        raise ConfigError(message if is_clone() else message + hint, field="use_pretrained")
    return path
