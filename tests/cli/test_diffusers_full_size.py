"""Full-size structures of google/ddpm-cifar10-32 and Stable Diffusion v1 in folders of diffusers, random weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim.diffusers_format import read_unet, resolve_config
from ddim.weights import load_unet
from ldm import diffusers_format as latent_format
from ldm.checkpoint import LatentCheckpoint, expected_shapes
from ldm.config import load_config
from ldm.encoders import clip_merges, make_tokenizer
from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.diffusers import quantize_pipeline
from qdiff.model import quant_layers
from tests.support.commands import script, succeeded
from tests.support.tiny_diffusers import LATENT_BETAS, change, diffusers, flat, saved, transformers

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
SD_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
THREADS = ["--threads", os.cpu_count()]


def images(folder: Path) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(folder.rglob("*.png")) if "grid" not in path.name]


def same_images(*folders: Path) -> bool:
    first, *others = map(images, folders)
    assert first and all(image.std() > 0 for image in first)
    return all(np.array_equal(a, b) for found in others for a, b in zip(first, found, strict=True))


def cifar10_unet() -> torch.nn.Module:
    """The structure of google/ddpm-cifar10-32."""
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()


def test_saved_weights_are_as_small_as_the_arithmetic(tmp_path):
    pipe = diffusers.DDPMPipeline(cifar10_unet(), diffusers.DDPMScheduler())
    nearest = {"rounding": "nearest", "policy_budget": 0, "smoothing": False, "iters_tune": 0}
    call = {"num_inference_steps": 2}
    quantize_pipeline(pipe, n=4, call=call, timesteps=2, images_per_call=2, weight_bit=4, act_bit=8, **nearest)
    pipe.save_pretrained(tmp_path)
    size = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    weights = sum(layer.shape.numel() for layer in quant_layers(pipe.unet).values())
    others = sum(parameter.numel() for parameter in pipe.unet.parameters())  # biases and norms
    assert weights > 35e6 and size == pytest.approx(weights * 4 / 8 + others * 4, rel=0.03)


def test_cifar10(tmp_path):
    """The settings are those of google/ddpm-cifar10-32, and all its files lie at the top."""
    unet = cifar10_unet()
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(variance_type="fixed_large"))
    folder = flat(tmp_path / "ddpm-cifar10-32", pipeline)
    torch.save(read_unet(DiffusersFolder(folder)), tmp_path / "model-790000.ckpt")
    network = load_unet(resolve_config(None, folder), folder)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    x, t = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor([500])
    with torch.no_grad():
        found, expected = network.double()(x, t), unet.double()(x, t).sample
    assert (found - expected).norm() / expected.norm() < 1e-5  # frequencies of time steps are float32 in both
    words = [
        "--config",
        "configs/cifar10.yml",
        "--timesteps",
        "2",
        "--eta",
        "0",
        "--skip_type",
        "quad",
        "--max_images",
        "2",
    ]
    for name, ckpt in (("original", tmp_path / "model-790000.ckpt"), ("folder", folder)):
        succeeded(script("sample_diffusion_ddim.py", *words, "--ckpt", ckpt, "-l", tmp_path / name, *THREADS))
    assert same_images(tmp_path / "original", tmp_path / "folder")
    change(folder / "scheduler_config.json", clip_sample=False)
    succeeded(script("sample_diffusion_ddim.py", *words[2:], "--ckpt", folder, "-l", tmp_path / "alone", *THREADS))
    assert same_images(tmp_path / "original", tmp_path / "alone")


def stable_diffusion(folder: Path) -> Path:
    text = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, vocab_size=49408
    )
    tokenizer = make_tokenizer(clip_merges())
    tokenizer.model_max_length = 77
    four = 4
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * four,
            up_block_types=("UpDecoderBlock2D",) * four,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=diffusers.PNDMScheduler(**LATENT_BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipeline, folder)


def test_stable_diffusion(tmp_path):
    folder = stable_diffusion(tmp_path / "stable-diffusion-v1-5")
    state = LatentCheckpoint(folder, latent_format.resolve_config(None, folder)).state
    expected = expected_shapes(load_config(SD_CONFIG))  # of the released file, with the buffers of its schedule
    state = {name if name in expected else name.replace("former.", "former.text_model."): state[name] for name in state}
    assert all(expected[name] == tensor.shape for name, tensor in state.items())
    parts = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    missing = [name for name in expected if name.startswith(parts) and name not in state]
    assert missing == ["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "model.ckpt")
    del state
    words = ["--prompt", "a puppy in the snow", "--plms", "--ddim_steps", 2, "--n_samples", 1, "--n_iter", 1]
    words += ["--H", 128, "--W", 128, "--precision", "full", *THREADS]
    runs = {
        "original": ["--ckpt", tmp_path / "model.ckpt"],
        "folder": ["--ckpt", folder],
        "agreeing": ["--ckpt", folder, "--config", SD_CONFIG],
    }
    for name, more in runs.items():
        succeeded(script("txt2img.py", *words, *more, "--outdir", tmp_path / name, timeout=1800))
    assert same_images(*(tmp_path / name for name in runs))
