"""Hashes that identify weights and calibration samples. `qdiff.utils.files` has the hashes of files."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def state_hash(state: Mapping[str, Tensor]) -> str:
    """The sha256 of a state dict: of the names, types, shapes and bytes of its tensors, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(tensor_hash(state[name]).encode())
    return digest.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """The sha256 of the type, the shape and the bytes of a tensor."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
