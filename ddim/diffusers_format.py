"""Pixel models in folders of diffusers: their settings become a `PixelConfig`, their weights get the released names.

The blocks of UNet2DModel are those of the pixel UNet under other names; the autoencoders of the latent family share
them.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.config import ModelConfig, PixelConfig, diffusion_config_from_dict, load_config, model_config_from_dict
from qdiff.checkpoint import diffusers_folder
from qdiff.checkpoint.diffusers_folder import DiffusersFolder, Settings, errors_name, require_agreement
from qdiff.checkpoint.diffusers_schedule import SCHEDULER_CLASSES, read_schedule
from qdiff.errors import ConfigError

log = logging.getLogger(__name__)

Rules = Sequence[tuple[str, str]]  # regular expressions of names with what replaces a match
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
PARTS = {"unet": ("diffusers.UNet2DModel",), "scheduler": SCHEDULER_CLASSES}
BATCH_SIZE = 64  # images that are sampled at a time; the folder names no number

# Settings of UNet2DModel: the value that it takes if a setting is missing, and the one that the networks here have.
UNET2D_EXPECTED: dict[str, tuple[Any, Any]] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "attn_norm_num_groups": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
PIXEL_EXPECTED = UNET2D_EXPECTED | {
    "norm_eps": (1e-5, 1e-6),
    "downsample_padding": (1, 0),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "attention_head_dim": (8, None),
}
UNET2D_HARMLESS = ("dropout", "num_train_timesteps")  # training reads them

# Names inside a block, where the released names differ from those of diffusers.
BLOCK_RULES: Rules = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),  # names of older files
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"(attentions\.\d+)\.group_norm\.", r"\1.norm."),
    (r"(attentions\.\d+)\.to_([qkv])\.", r"\1.\2."),
    (r"(attentions\.\d+)\.to_out\.0\.", r"\1.proj_out."),
    (r"\bmid_block\.resnets\.0\.", "mid.block_1."),
    (r"\bmid_block\.resnets\.1\.", "mid.block_2."),
    (r"\bmid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\bdown_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"down.\1.downsample.conv."),
    (r"\bup_blocks\.(\d+)\.upsamplers\.0\.conv\.", r"up.\1.upsample.conv."),
    (r"\b(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.\2.block.\3."),
    (r"\b(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r"\1.\2.attn.\3."),
    (r"\bconv_norm_out\.", "norm_out."),
)
UNET_RULES: Rules = (
    *BLOCK_RULES,
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
)
PROJECTIONS = re.compile(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight$")  # 1x1 convolutions here, linear there


def rename(name: str, rules: Rules) -> str:
    """Apply every rule to a name, in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def released_block_names(state: Mapping[str, Tensor], rules: Rules, levels: int) -> dict[str, Tensor]:
    """Give the tensors of a UNet of pixels, or of an autoencoder, their released names and shapes.

    Args:
        state: the tensors as diffusers names them.
        rules: the names.
        levels: the number of resolutions; diffusers counts those of the upward path from the lowest one.
    """

    def reverse(match: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(match[1])}."

    released = {}
    for name, tensor in state.items():
        name = re.sub(r"\bup\.(\d+)\.", reverse, rename(name, rules))
        released[name] = as_convolution(tensor, 2) if PROJECTIONS.search(name) else tensor
    return released


def as_convolution(weight: Tensor, dims: int) -> Tensor:
    """Reshape the weight of a linear layer [O, I] to that of a 1x1 convolution in `dims` dimensions."""
    return weight.reshape(*weight.shape[:2], *[1] * dims) if weight.dim() == 2 else weight


def channel_multipliers(settings: Settings) -> tuple[int, tuple[int, ...]]:
    """Return the width of the first layer, and the widths of all resolutions as multiples of it.

    Raises:
        ConfigError: a width is no multiple.
    """
    widths = settings.get("block_out_channels", tuple[int, ...], None)
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        settings.refuse("block_out_channels", ": expected multiples of the first width", widths)
    return widths[0], tuple(width // widths[0] for width in widths)


def attention_levels(settings: Settings, kinds: Mapping[str, str], levels: int) -> list[int]:
    """Return the resolutions with attention, counted from the highest one.

    Args:
        settings: the settings of a UNet or of an autoencoder.
        kinds: from each supported block type of the downward path to its counterpart in the upward path.
        levels: the number of resolutions.

    Raises:
        ConfigError: a block type is not supported, or the upward path does not mirror the downward path.
    """
    down = settings.get("down_block_types", tuple[str, ...], None)
    up = settings.get("up_block_types", tuple[str, ...], None)
    for name, found, known in (("down", down, kinds), ("up", up, kinds.values())):
        if len(found) != levels or not set(found) <= set(known):
            settings.refuse(f"{name}_block_types", f": expected {levels} of {', '.join(known)}", found)
    mirror = tuple(kinds[kind] for kind in reversed(down))
    if up != mirror:
        settings.refuse("up_block_types", f": expected {', '.join(mirror)}, the mirror of down_block_types", up)
    return [level for level, kind in enumerate(down) if "Attn" in kind]


def unet2d_attention_levels(settings: Settings, levels: int) -> list[int]:
    """Return the resolutions of a UNet2DModel with attention; see `attention_levels`."""
    return attention_levels(settings, {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}, levels)


def _model_config(settings: Settings) -> ModelConfig:
    """Make the configuration of the UNet from the settings of a UNet2DModel."""
    settings.expect(PIXEL_EXPECTED)
    ch, multipliers = channel_multipliers(settings)
    size = settings.square_size("sample_size")
    levels = unet2d_attention_levels(settings, len(multipliers))
    values = {
        "image_size": size,
        "in_channels": settings.get("in_channels", int, 3),
        "out_ch": settings.get("out_channels", int, 3),
        "ch": ch,
        "ch_mult": multipliers,
        "num_res_blocks": settings.get("layers_per_block", int, 2),
        "attn_resolutions": tuple(size // 2**level for level in levels),
        "norm_groups": settings.get("norm_num_groups", int, 32),
    }
    settings.finish(UNET2D_HARMLESS)
    with errors_name(settings.file):
        return model_config_from_dict(values)


def read_config(folder: DiffusersFolder) -> PixelConfig:
    """Read the configuration of a pixel model from a folder of diffusers.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the folder holds another kind of model, or a setting is not supported.
    """
    folder.require_pipeline(PIPELINES, PARTS)
    if folder.is_latent:
        raise ConfigError(f"{folder.path}: a latent model: expected a pixel model (UNet2DModel without an autoencoder)")
    schedule = read_schedule(folder, "linear", clipping=(True, False))
    diffusion = {
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_diffusion_timesteps": schedule.num_timesteps,
        "parameterization": schedule.parameterization,
    }
    with errors_name(folder.scheduler().file):
        diffusion_config = diffusion_config_from_dict(diffusion)
    return PixelConfig(
        path=folder.path,
        model=_model_config(folder.part("unet").settings("UNet2DModel")),
        diffusion=diffusion_config,
        batch_size=BATCH_SIZE,
        pretrained=None,
        training={},
        clip_x0=schedule.clip_x0,
    )


def _comparable(config: PixelConfig) -> dict[str, Any]:
    """The settings of a configuration that change the function of the network or the noise schedule, by name."""
    model = asdict(replace(config.model, attn_resolutions=tuple(sorted(config.model.attn_resolutions))))
    del model["dropout"]  # does nothing in eval mode
    named = {"model": model, "diffusion": asdict(config.diffusion)}
    return {f"{section}.{name}": value for section, values in named.items() for name, value in values.items()}


def resolve_config(config: Path | None, checkpoint: Path | None) -> PixelConfig:
    """Return the configuration of a pixel model; see `diffusers_folder.resolve_config`."""
    return diffusers_folder.resolve_config(config, checkpoint, load_config, read_config, _agreed)


def _agreed(given: PixelConfig, found: PixelConfig, folder: DiffusersFolder) -> PixelConfig:
    """The configuration of a YAML file, which agrees with that of a folder. ConfigError if it does not."""
    require_agreement(_comparable(given), _comparable(found), given.path, folder.path)
    if found.clip_x0 is not None and math.isfinite(found.clip_x0):
        log.warning(
            "%s: clip_sample true is left to the samplers, which are the published ones with a YAML file: ddpm_noisy "
            "clips x_0, generalized does not; without the file, both clip",
            folder.scheduler().file,
        )
    return given


def read_unet(folder: DiffusersFolder) -> dict[str, Tensor]:
    """Read the weights of the UNet under their released names. CheckpointError if they are missing or damaged."""
    part = folder.part("unet")
    levels = len(part.values.get("block_out_channels", ()))
    return released_block_names(part.tensors(), UNET_RULES, levels)
