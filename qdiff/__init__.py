"""Q-Diffusion: post-training quantization of diffusion models (Li et al., ICCV 2023, arXiv 2302.04304)."""
