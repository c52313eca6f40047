"""Choosing a device by name."""

import os

import torch

from qdiff.errors import ConfigError


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
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
