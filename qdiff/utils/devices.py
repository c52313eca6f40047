"""Choosing a device by name, and the precision of its products."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qdiff.errors import ConfigError

log = logging.getLogger(__name__)


def select_device(name: str | torch.device) -> torch.device:
    """The device of a name.

    Args:
        name: `auto` (the best one present), `cpu`, `cuda` or `mps`; a torch.device is returned as it is. Under
            torchrun each process of a machine gets a GPU of its own.

    Raises:
        ConfigError: no such device is present.
    """
    if isinstance(name, torch.device):
        return name
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present.get(name, False):
        found = ", ".join(kind for kind, there in present.items() if there)
        raise ConfigError(f" {name}: not present here; found {found}", field="device")
    if name != "cuda":
        return torch.device(name)
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)  # libraries work on the current GPU whatever the device of their tensors is
    return device


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Choose how CUDA multiplies float32 inside: in full, or in TF32 with 10 bits of mantissa.

    By PyTorch's default convolutions take TF32 and matmuls do not. Convolutions inside are deterministic, so that the
    same work gives the same bits, as a resumed calibration needs. Other devices are not touched.

    Args:
        device: the device of the work.
        tf32: faster products for a calibration; False: full precision, for sampling and evaluation.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    cudnn.deterministic, cudnn.benchmark = True, False
    log.info("float32 products on CUDA: %s", "TF32" if tf32 else "full precision")
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
