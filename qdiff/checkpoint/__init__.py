"""Checkpoints: reading any of them safely, and the two formats of a quantized network, published and packed."""

from qdiff.checkpoint.hashes import state_hash
from qdiff.checkpoint.packed import (
    PackedInfo,
    check_packed,
    is_packed,
    load_packed,
    model_parts_file,
    pack_integers,
    read_packed_info,
    save_packed,
    unpack_integers,
)
from qdiff.checkpoint.published import load_published, midpoint_weights, published_shapes, save_published
from qdiff.checkpoint.reading import load_into, load_object, read_tensors

__all__ = [
    "PackedInfo",
    "check_packed",
    "is_packed",
    "load_into",
    "load_object",
    "load_packed",
    "load_published",
    "midpoint_weights",
    "model_parts_file",
    "pack_integers",
    "published_shapes",
    "read_packed_info",
    "read_tensors",
    "save_packed",
    "save_published",
    "state_hash",
    "unpack_integers",
]
