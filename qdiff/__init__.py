"""Q-Diffusion: post-training quantization of diffusion models (Li et al., ICCV 2023, arXiv 2302.04304)."""

from qdiff.api import load, quantize, save

__all__ = ["load", "quantize", "save"]
