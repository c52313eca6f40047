"""Folders of diffusers with networks small enough to run in milliseconds, made by the library itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.encoders import make_tokenizer, read_merges
from qdiff.utils.compat import make_torchvision_importable

make_torchvision_importable()
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNET2D = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
PIXEL = UNET2D | {
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}
CONDITION = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "sample_size": 16,
    "norm_num_groups": 4,
}
LATENT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TOKENS = 8  # of a context
MERGES = "models/ldm/emoji64-text/merges.txt"


def shaken(network: nn.Module) -> nn.Module:
    """The network with random biases and norms too, which are 0 and 1 otherwise and hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def pixel_pipeline(**changes: Any) -> Any:
    unet = shaken(diffusers.UNet2DModel(**PIXEL | changes))
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def latent_pipeline(**changes: Any) -> Any:
    from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline

    unet = shaken(diffusers.UNet2DModel(**UNET2D | {"attention_head_dim": 8} | changes))
    vqvae = shaken(diffusers.VQModel(**AUTOENCODER, num_vq_embeddings=40, scaling_factor=1.0))
    return LDMPipeline(vqvae, unet, diffusers.DDIMScheduler(**LATENT_BETAS, clip_sample=False))


def text_pipeline(second: bool = False, **changes: Any) -> Any:
    """Stable Diffusion; `second`: with what is different in Stable Diffusion 2."""
    tokenizer = make_tokenizer(read_merges(MERGES))
    tokenizer.model_max_length = TOKENS
    if second:
        tokenizer.pad_token = "!"
        changes = {"attention_head_dim": [2, 4, 2], "use_linear_projection": True} | changes
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=3 if second else 2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=0,
        eos_token_id=0,
    )
    prediction = "v_prediction" if second else "epsilon"
    return diffusers.StableDiffusionPipeline(
        vae=shaken(diffusers.AutoencoderKL(**AUTOENCODER)),
        text_encoder=shaken(transformers.CLIPTextModel(text)),
        tokenizer=tokenizer,
        unet=shaken(diffusers.UNet2DConditionModel(**CONDITION | changes)),
        scheduler=diffusers.PNDMScheduler(
            **LATENT_BETAS, skip_prk_steps=True, steps_offset=1, prediction_type=prediction
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def saved(pipeline: Any, folder: Path, **options: Any) -> Path:
    """The folder that the pipeline is saved to."""
    pipeline.save_pretrained(folder, **options)
    return folder


def flat(folder: Path, pipeline: Any) -> Path:
    """The layout of google/ddpm-*: the files of the UNet and of the scheduler at the top."""
    pipeline.unet.save_pretrained(folder)
    pipeline.scheduler.save_pretrained(folder)
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DModel"]}))
    return folder


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; the value `...` removes the key."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
