"""The latent family: latent diffusion and Stable Diffusion."""
