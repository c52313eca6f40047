"""Latent diffusion and Stable Diffusion."""
