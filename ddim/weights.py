"""Full-precision weights of the pixel family: public checkpoints, fetched once and checked, or embedded ones."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from torch import nn
from tqdm import tqdm

from ddim.config import PixelConfig
from ddim.unet import UNet
from qdiff.checkpoint import CheckpointError, load_into, read_tensors
from qdiff.config import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
HOST = "https://heibox.uni-heidelberg.de/f"
# name: (address, path in the cache, md5); EMA weights of the "pytorch_diffusion" release
PUBLIC = {
    "ema_cifar10": ("2e4f01e2d9ee49bab1d5", "ema_diffusion_cifar10_model/model-790000.ckpt", "1fa350b952534ae442b1d5235cce5cd3"),
    "ema_lsun_bedroom": ("b95206528f384185889b", "ema_diffusion_lsun_bedroom_model/model-2388000.ckpt", "1921fa46b66a3665e450e42f36c2720f"),
    "ema_lsun_cat": ("0701aac3aa69457bbe34", "ema_diffusion_lsun_cat_model/model-1761000.ckpt", "646f23f4821f2459b8bafc57fd824558"),
    "ema_lsun_church": ("44ccb50ef3c6436db52e", "ema_diffusion_lsun_church_model/model-4432000.ckpt", "fdc68a23938c2397caba4a260bc2445f"),
}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/diffusion_models_converted`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion_models_converted"


def load_unet(config: PixelConfig, checkpoint: str | None) -> nn.Module:
    """The full-precision UNet from a local file, or from the configuration's pretrained weights.

    Raises:
        CheckpointError: the file does not hold this network. ConfigError: no weights to be had.
    """
    path = Path(checkpoint) if checkpoint else pretrained_file(config)
    return load_into(UNet(config.model), read_tensors(path), path).eval()


def pretrained_file(config: PixelConfig) -> Path:
    """The file of `--use_pretrained`: embedded, cached, or fetched now."""
    name = config.pretrained
    if name is None:
        raise ConfigError(f"--use_pretrained: {config.path} names no pretrained weights; give a file with --ckpt")
    if name in PUBLIC:
        address, place, md5 = PUBLIC[name]
        return fetch(f"{HOST}/{address}/?dl=1", cache_folder() / place, md5)
    path = REPOSITORY / name
    if not path.is_file():
        raise ConfigError(f"--use_pretrained: {path}: no such file (named by {config.path})")
    return path


def fetch(url: str, path: Path, md5: str) -> Path:
    """`path`, downloaded from `url` if it is not there, continuing an earlier attempt; md5 checked.

    Raises:
        ConfigError: no connection, or the content is not what was expected.
    """
    if path.is_file():
        _check_md5(path, md5, path)
        return path
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, partial)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"no weights at {path}, and {url} cannot be reached ({reason}); put the file there or give one with --ckpt"
        ) from None
    _check_md5(partial, md5, url)
    partial.replace(path)
    return path


def _download(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing left to fetch: the whole file is there
            return
        raise
    with response:
        resumed = response.status == 206
        length = int(response.headers.get("Content-Length") or 0)
        done = start if resumed else 0
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=done + length or None, initial=done, unit="B", unit_scale=True, desc=partial.stem) as progress,
        ):
            while block := response.read(1 << 20):
                file.write(block)
                progress.update(len(block))
        if length and partial.stat().st_size < done + length:
            raise OSError(f"the connection broke after {partial.stat().st_size} of {done + length} bytes; the same command continues")


def _check_md5(path: Path, expected: str, source: Path | str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != expected:
        if path.suffix == ".partial":
            path.unlink()
        raise CheckpointError(f"{source}: md5 {found}, expected {expected}: damaged or another file; remove it and try again")
