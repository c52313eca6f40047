"""Checkpoints: safe reading, and the two file formats of a quantized network, published and packed."""

from qdiff.checkpoint.hashes import state_hash
from qdiff.checkpoint.packed import (
    PackedFile,
    PackedInfo,
    load_packed,
    pack_integers,
    save_packed,
    unpack_integers,
)
from qdiff.checkpoint.published import load_published, midpoint_weights, published_shapes, save_published
from qdiff.checkpoint.reading import load_into, load_object, read_tensors

__all__ = [
    "PackedFile",
    "PackedInfo",
    "load_into",
    "load_object",
    "load_packed",
    "load_published",
    "midpoint_weights",
    "pack_integers",
    "published_shapes",
    "read_tensors",
    "save_packed",
    "save_published",
    "state_hash",
    "unpack_integers",
]
