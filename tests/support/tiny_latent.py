"""Latent models small enough to run in seconds, as official-looking checkpoints beside their YAML files."""

import sys
import types
from pathlib import Path

import torch
import yaml

from ldm.checkpoint import expected_shapes
from ldm.config import load_config

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 16,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
    "norm_groups": 4,
}
AUTOENCODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_groups": 4,
}
CONDITIONED = {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 16}
ENCODERS = {
    "text": {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {
            "width": 16,
            "layers": 1,
            "heads": 2,
            "max_length": 8,
            "vocabulary": "models/ldm/emoji64-text/merges.txt",
        },
    },
    "class": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 16, "n_classes": 6}},
    "none": "__is_unconditional__",
}


def config(kind: str = "none", **params) -> dict:
    """The content of a YAML file; `kind` none | class | text."""
    values = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "image_size": 8,
        "channels": 4,
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": UNET | (CONDITIONED if kind != "none" else {}),
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "ddconfig": AUTOENCODER},
        },
        "cond_stage_config": ENCODERS[kind],
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": values | params}}


def state(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the released names of the model whose YAML file is at `path`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(load_config(path)).items():
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[1])[None]
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm3.weight")):
            tensors[name] = torch.ones(shape)
        else:
            fan_in = max(1, shape.numel() // max(shape[0], 1)) if shape else 1
            tensors[name] = torch.randn(shape, generator=generator) * 0.5 / fan_in**0.5
    if "scale_factor" in tensors:
        tensors["scale_factor"] = torch.tensor(0.7)
    return tensors


def model_folder(folder: Path, kind: str = "none", **params) -> Path:
    """`config.yaml` and a `model.ckpt` as training frameworks write them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(kind, **params)))
    save_as_lightning(folder / "model.ckpt", state(folder / "config.yaml"))
    return folder


def save_as_lightning(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A checkpoint with a pickled callback class in it, whose module exists only while it is written."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    kept = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    kind = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = kind
    try:
        torch.save(
            {"state_dict": tensors, "global_step": 7, "callbacks": {kind: {"best": 1.0}, "object": kind()}}, path
        )
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
