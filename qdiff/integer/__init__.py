"""Inference on integers: quantized products run on int8 operators straight from a packed checkpoint."""

from qdiff.integer.engine import ENGINES, prepare

__all__ = ["ENGINES", "prepare"]
