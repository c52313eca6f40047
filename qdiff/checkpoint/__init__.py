"""Checkpoints: reading any of them safely, and the two formats of a quantized network, published and packed."""

from qdiff.checkpoint.hashes import state_hash
from qdiff.checkpoint.packed import (
    PackedInfo,
    check_packed,
    is_packed,
    load_packed,
    pack_integers,
    read_packed_info,
    save_packed,
    stages_file,
    unpack_integers,
)
from qdiff.checkpoint.published import load_published, midpoint_weights, published_shapes, save_published
from qdiff.checkpoint.reading import CheckpointError, load_into, load_object, read_tensors

__all__ = [
    "CheckpointError",
    "PackedInfo",
    "check_packed",
    "is_packed",
    "load_into",
    "load_object",
    "load_packed",
    "load_published",
    "midpoint_weights",
    "pack_integers",
    "published_shapes",
    "read_packed_info",
    "read_tensors",
    "save_packed",
    "save_published",
    "stages_file",
    "state_hash",
    "unpack_integers",
]
