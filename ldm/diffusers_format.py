"""Latent models in folders of diffusers: settings become a `LatentConfig`, weights get the released names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.diffusers_format import (
    BLOCK_RULES,
    UNET2D_EXPECTED,
    UNET2D_HARMLESS,
    Rules,
    as_convolution,
    attention_levels,
    channel_multipliers,
    released_block_names,
    rename,
    unet2d_attention_levels,
)
from ldm.autoencoder import AutoencoderKL, FirstStage, VQModel
from ldm.config import LatentConfig, ModuleSpec, load_config, validate
from ldm.encoders import Conditioner, FrozenCLIPEmbedder, TransformersEmbedder
from ldm.unet import UNetConfig, unet_config
from qdiff.checkpoint import diffusers_folder
from qdiff.checkpoint.diffusers_folder import (
    DiffusersFolder,
    Settings,
    errors_name,
    read_json,
    require_agreement,
)
from qdiff.checkpoint.diffusers_schedule import SCHEDULER_CLASSES, read_schedule
from qdiff.errors import CheckpointError, ConfigError

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LDMPipeline",
    "LatentDiffusionUncondPipeline",
)
PARTS = {
    "unet": ("diffusers.UNet2DConditionModel", "diffusers.UNet2DModel"),
    "vae": ("diffusers.AutoencoderKL",),
    "vqvae": ("diffusers.VQModel", "diffusers.AutoencoderKL"),
    "text_encoder": ("transformers.CLIPTextModel",),
    "tokenizer": ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast"),
    "scheduler": SCHEDULER_CLASSES,
}

# For each class: the value that it takes if a setting is missing, and the one that the networks here have.
LATENT_2D_EXPECTED = UNET2D_EXPECTED | {
    "norm_eps": (1e-5, 1e-5),
    "downsample_padding": (1, 1),
    "freq_shift": (0, 0),
    "flip_sin_to_cos": (True, True),
}
CONDITION_EXPECTED: dict[str, tuple[Any, Any]] = {
    "norm_eps": (1e-5, 1e-5),
    "downsample_padding": (1, 1),
    "freq_shift": (0, 0),
    "flip_sin_to_cos": (True, True),
    "center_input_sample": (False, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn"),
    "mid_block_scale_factor": (1, 1),
    "mid_block_only_cross_attention": (None, None),
    "only_cross_attention": (False, False),
    "dual_cross_attention": (False, False),
    "cross_attention_norm": (None, None),
    "act_fn": ("silu", "silu"),
    "reverse_transformer_layers_per_block": (None, None),
    "num_attention_heads": (None, None),
    "attention_type": ("default", "default"),
    "encoder_hid_dim": (None, None),
    "encoder_hid_dim_type": (None, None),
    "class_embed_type": (None, None),
    "class_embeddings_concat": (False, False),
    "num_class_embeds": (None, None),
    "projection_class_embeddings_input_dim": (None, None),
    "addition_embed_type": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "resnet_skip_time_act": (False, False),
    "resnet_out_scale_factor": (1, 1),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "time_embedding_act_fn": (None, None),
    "timestep_post_act": (None, None),
    "time_cond_proj_dim": (None, None),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
}
# They act in training or change the precision only, belong to embeddings that are refused, or the weights show them.
CONDITION_HARMLESS = (
    *("dropout", "upcast_attention", "use_linear_projection"),
    *("addition_time_embed_dim", "addition_embed_type_num_heads"),
)
AUTOENCODER_EXPECTED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "mid_block_add_attention": (True, True),
    "shift_factor": (None, None),
    "latents_mean": (None, None),
    "latents_std": (None, None),
    "use_quant_conv": (True, True),
    "use_post_quant_conv": (True, True),
    "norm_type": ("group", "group"),
    "lookup_from_codebook": (False, False),
}
AUTOENCODER_HARMLESS = ("sample_size", "force_upcast")
TEXT_SETTINGS: dict[str, tuple[type, Any]] = {  # of CLIPTextConfig, with its defaults
    "vocab_size": (int, 49408),
    "hidden_size": (int, 512),
    "intermediate_size": (int, 2048),
    "num_hidden_layers": (int, 12),
    "num_attention_heads": (int, 8),
    "max_position_embeddings": (int, 77),
    "hidden_act": (str, "quick_gelu"),
    "layer_norm_eps": (float, 1e-5),
}
TEXT_HARMLESS = (  # names, initial values, training, the pooled output, and the precision of the file
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "initializer_factor"),
    *("initializer_range", "attention_dropout", "dropout", "projection_dim", "bos_token_id", "eos_token_id"),
    "pad_token_id",
)
ACTIVATIONS = ("quick_gelu", "gelu")
RESIDUAL_RULES: Rules = (
    (r"^norm1\.", "in_layers.0."),
    (r"^conv1\.", "in_layers.2."),
    (r"^time_emb_proj\.", "emb_layers.1."),
    (r"^norm2\.", "out_layers.0."),
    (r"^conv2\.", "out_layers.3."),
    (r"^conv_shortcut\.", "skip_connection."),
)
ATTENTION_RULES: Rules = (
    (r"^query\.", "to_q."),  # names of older files
    (r"^key\.", "to_k."),
    (r"^value\.", "to_v."),
    (r"^(proj_attn|to_out\.0)\.", "proj_out."),
    (r"^group_norm\.", "norm."),
)


def read_config(folder: DiffusersFolder) -> LatentConfig:
    """Read the configuration of a latent model from a folder of diffusers.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the folder holds another kind of model, or a setting is not supported.
    """
    folder.require_pipeline(PIPELINES, PARTS)
    if not folder.is_latent:
        raise ConfigError(
            f"{folder.path}: a pixel model: expected a latent model (with vae or vqvae); "
            "scripts/sample_diffusion_ddim.py samples it"
        )
    schedule = read_schedule(folder, "scaled_linear", clipping=(False,))
    unet, image_size = _read_unet_config(folder)
    first_stage, channels, scale_factor = _read_first_stage(folder, image_size)
    conditioning = None if unet.context_dim is None else _read_conditioning(folder, unet.context_dim)
    config = LatentConfig(
        path=folder.path,
        unet=unet,
        first_stage=first_stage,
        conditioning=conditioning,
        linear_start=schedule.beta_start,
        linear_end=schedule.beta_end,
        image_size=image_size,
        channels=channels,
        scale_factor=scale_factor,
        timesteps=schedule.num_timesteps,
        use_ema=False,
        parameterization=schedule.parameterization,
    )
    with errors_name(folder.path):
        validate(config)
    return config


def _read_unet_config(folder: DiffusersFolder) -> tuple[UNetConfig, int]:
    """Read the configuration of the UNet. Returns it with the width and height of the latents."""
    part = folder.part("unet")
    settings, is_conditional = part.settings("UNet2DConditionModel", "UNet2DModel"), part.class_name != "UNet2DModel"
    channels, multipliers = channel_multipliers(settings)
    values: dict[str, Any] = {
        "in_channels": settings.get("in_channels", int, 4 if is_conditional else 3),
        "out_channels": settings.get("out_channels", int, 4 if is_conditional else 3),
        "model_channels": channels,
        "channel_mult": multipliers,
        "num_res_blocks": _same_for_all(settings, "layers_per_block", 2),
        "norm_groups": settings.get("norm_num_groups", int, 32),
    }
    image_size = settings.square_size("sample_size")
    widths = [channels * multiplier for multiplier in multipliers]
    if not is_conditional:
        settings.expect(LATENT_2D_EXPECTED)
        levels = unet2d_attention_levels(settings, len(widths))
        head_channels = settings.get("attention_head_dim", int | None, 8)
        heads = {"num_heads": 1} if head_channels is None else {"num_head_channels": head_channels}
        settings.finish(UNET2D_HARMLESS)
    else:
        settings.expect(CONDITION_EXPECTED)
        kinds = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
        levels = attention_levels(settings, kinds, len(widths))
        heads = _condition_heads(settings, widths)
        values |= {
            "use_spatial_transformer": True,
            "transformer_depth": _same_for_all(settings, "transformer_layers_per_block", 1),
            "context_dim": settings.get("cross_attention_dim", int, 1280),
        }
        settings.finish(CONDITION_HARMLESS)
    with errors_name(settings.file):
        return unet_config(values | heads | {"attention_resolutions": [2**level for level in levels]}), image_size


def _same_for_all(settings: Settings, name: str, default: int) -> int:
    """Read a number that may be given for each resolution. ConfigError if the resolutions differ."""
    value = settings.get(name, int | tuple[int, ...], default)
    if isinstance(value, tuple) and len(set(value)) != 1:
        settings.refuse(name, ": expected the same number for all resolutions", value)
    return value[0] if isinstance(value, tuple) else value


def _condition_heads(settings: Settings, widths: list[int]) -> dict[str, Any]:
    """Read the number of heads of a UNet2DConditionModel, whose `attention_head_dim` means that number."""
    heads = settings.get("attention_head_dim", int | tuple[int, ...], 8)
    if not isinstance(heads, tuple):
        return {"num_heads": heads}
    if len(heads) != len(widths) or min(heads) < 1:
        settings.refuse("attention_head_dim", f": expected the heads of {len(widths)} resolutions", heads)
    head_channels = {width / number for width, number in zip(widths, heads, strict=True)}
    if len(head_channels) == 1 and (constant := head_channels.pop()).is_integer():
        return {"num_head_channels": int(constant)}
    return {"num_heads": heads}


def _read_first_stage(folder: DiffusersFolder, image_size: int) -> tuple[ModuleSpec[FirstStage], int, float]:
    """Read the configuration of the autoencoder.

    Args:
        folder: the folder.
        image_size: width and height of the latents.

    Returns:
        The autoencoder, the number of channels of its latents, and the factor that latents are multiplied by.
    """
    part = folder.part("vqvae" if folder.has("vqvae") else "vae")
    settings = part.settings("AutoencoderKL", "VQModel")
    is_kl = part.class_name == "AutoencoderKL"
    settings.expect(AUTOENCODER_EXPECTED)
    ch, multipliers = channel_multipliers(settings)
    attention_levels(settings, {"DownEncoderBlock2D": "UpDecoderBlock2D"}, len(multipliers))
    channels = settings.get("latent_channels", int, 4 if is_kl else 3)
    networks = {
        "double_z": is_kl,
        "z_channels": channels,
        "resolution": image_size * 2 ** (len(multipliers) - 1),
        "in_channels": settings.get("in_channels", int, 3),
        "out_ch": settings.get("out_channels", int, 3),
        "ch": ch,
        "ch_mult": multipliers,
        "num_res_blocks": settings.get("layers_per_block", int, 1),
        "norm_groups": settings.get("norm_num_groups", int, 32),
    }
    # older files of VQModel do not have the factor, because latents were not scaled
    scale_factor = settings.get("scaling_factor", float, 0.18215 if is_kl else 1.0)
    if not scale_factor > 0:
        settings.refuse("scaling_factor", ": expected a positive number", scale_factor)
    params: dict[str, Any] = {"embed_dim": channels, "ddconfig": networks}
    if not is_kl:
        params["embed_dim"] = settings.get("vq_embed_dim", int | None, None) or channels
        params["n_embed"] = settings.get("num_vq_embeddings", int, 256)
    settings.finish(AUTOENCODER_HARMLESS)
    kind: type[FirstStage] = AutoencoderKL if is_kl else VQModel
    return ModuleSpec(kind, params, str(settings.file)), int(params["embed_dim"]), scale_factor


def _read_conditioning(folder: DiffusersFolder, context_dim: int) -> ModuleSpec[Conditioner]:
    """Read the configuration of the text tower and of its tokenizer."""
    settings = folder.part("text_encoder").settings("CLIPTextModel")
    values = {name: settings.get(name, kind, default) for name, (kind, default) in TEXT_SETTINGS.items()}
    if values["hidden_act"] not in ACTIVATIONS:
        settings.refuse("hidden_act", f": expected {' or '.join(ACTIVATIONS)}", values["hidden_act"])
    if values["hidden_size"] != context_dim:
        settings.refuse("hidden_size", f": expected {context_dim}, the cross_attention_dim", values["hidden_size"])
    settings.finish(TEXT_HARMLESS)
    tokenizer = folder.path / "tokenizer"
    if not ((tokenizer / "tokenizer.json").is_file() or (tokenizer / "vocab.json").is_file()):
        raise CheckpointError(f"{tokenizer}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    length, positions = (
        read_json(tokenizer / "tokenizer_config.json").get("model_max_length"),
        "max_position_embeddings",
    )
    max_length = min(int(length), values[positions]) if isinstance(length, int | float) else values[positions]
    params = {"settings": values, "max_length": max_length, "tokenizer_folder": str(tokenizer)}
    return ModuleSpec(TransformersEmbedder, params, str(settings.file))


def _comparable(config: LatentConfig) -> dict[str, Any]:
    """The settings of a configuration that change the function of the networks or the noise schedule, by name."""
    unet = asdict(config.unet)
    del unet["dropout"], unet["num_heads"], unet["num_head_channels"]
    unet["attention_resolutions"] = sorted(config.unet.attention_resolutions)
    last = len(config.unet.channel_mult) - 1  # of the block in the middle, which always has attention
    with_attention = [
        level for level in range(last + 1) if 2**level in config.unet.attention_resolutions or level == last
    ]
    unet["heads of each resolution"] = [config.unet.heads(level) for level in with_attention]
    schedule = {
        name: getattr(config, name)
        for name in ("linear_start", "linear_end", "timesteps", "parameterization", "image_size", "channels")
    }
    first_stage = {"class": config.first_stage.kind.__name__} | _autoencoder_values(config.first_stage.params)
    named = {"": schedule, "unet_config.": unet, "first_stage_config.": first_stage}
    values = {f"{section}{name}": value for section, part in named.items() for name, value in part.items()}
    values["scale_factor"] = config.scale_factor
    return values | {f"cond_stage_config.{name}": value for name, value in _text_values(config.conditioning).items()}


def _autoencoder_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an autoencoder that change its function."""
    networks = {"norm_groups": 32, "attn_resolutions": [], "double_z": True} | dict(params.get("ddconfig", {}))
    ignored = ("dropout", "resolution")
    values = {name: value for name, value in networks.items() if name not in ignored}
    values |= {name: params.get(name) for name in ("embed_dim", "n_embed")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _text_values(conditioning: ModuleSpec[Conditioner] | None) -> dict[str, Any]:
    """The settings of a text tower that change its function; for another conditioner its class."""
    if conditioning is None or conditioning.kind not in (FrozenCLIPEmbedder, TransformersEmbedder):
        return {"class": None if conditioning is None else conditioning.kind.__name__}
    with torch.device("meta"):
        tower = conditioning.make().state_dict()
    params = conditioning.params
    settings = params.get("settings", {})
    return {
        "class": "a text tower",
        "activation": settings.get("hidden_act", "quick_gelu"),
        "heads": settings.get("num_attention_heads", params.get("heads", 12)),
        "layers": len({name for name in tower if name.endswith(".mlp.fc1.bias")}),
        "tokens": list(tower["transformer.text_model.embeddings.token_embedding.weight"].shape),
        "max_length": params.get("max_length", 77),
    }


def resolve_config(config: Path | None, checkpoint: Path | None) -> LatentConfig:
    """Return the configuration of a latent model; see `diffusers_folder.resolve_config`."""
    return diffusers_folder.resolve_config(config, checkpoint, load_config, read_config, _agreed)


def _agreed(given: LatentConfig, found: LatentConfig, folder: DiffusersFolder) -> LatentConfig:
    """The configuration of a folder, named by the YAML file, which agrees with it. ConfigError if it does not."""
    expected = _comparable(found)
    if given.scale_factor is None:  # the YAML file leaves it to the checkpoint
        del expected["scale_factor"]
    require_agreement(_comparable(given), expected, given.path, folder.path)
    return replace(found, path=given.path)


def read_networks(folder: DiffusersFolder, config: UNetConfig) -> dict[str, dict[str, Tensor]]:
    """Read the weights of all networks under their released names, without the prefixes of a CompVis checkpoint.

    Args:
        folder: the folder.
        config: the configuration of the UNet.

    Returns:
        The tensors of `unet`, `first_stage` and, in a text model, `text_encoder`.

    Raises:
        CheckpointError: weights are missing or damaged.
    """
    stage = folder.part("vqvae" if folder.has("vqvae") else "vae")
    levels = len(stage.values.get("block_out_channels", ()))
    networks = {
        "unet": released_unet_names(folder.part("unet").tensors(), config),
        "first_stage": released_block_names(stage.tensors(), BLOCK_RULES, levels),
    }
    if folder.has("text_encoder"):
        networks["text_encoder"] = folder.part("text_encoder").tensors()
    return networks


@dataclass(frozen=True)
class _Place:
    """Where a module of diffusers is in the released network.

    Attributes:
        prefix: the beginning of its released names.
        level: its resolution, counted from the highest one.
        rules: the names inside it.
    """

    prefix: str
    level: int = 0
    rules: Rules = ()


def released_unet_names(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Give the tensors of a UNet of latents their released names and shapes.

    Args:
        state: the tensors as diffusers names them.
        config: the configuration of the UNet.
    """
    places = _places(config)
    released = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in places if name.startswith(prefix)), "")
        place = places.get(prefix, _Place(""))
        inner = rename(name.removeprefix(prefix), place.rules)
        if inner in ("proj_in.weight", "proj_out.weight"):  # 1x1 convolutions here, sometimes linear there
            tensor = as_convolution(tensor, 2 if config.use_spatial_transformer else 1)
        released[place.prefix + inner] = tensor
    for place in places.values():
        if place.rules is ATTENTION_RULES:
            _join_projections(released, place.prefix, config.heads(place.level))
    return released


def _places(config: UNetConfig) -> dict[str, _Place]:
    """Return the place of each module, by the beginning of the names that diffusers gives its tensors."""
    layers, levels = config.num_res_blocks, len(config.channel_mult)
    attention = () if config.use_spatial_transformer else ATTENTION_RULES
    places = {
        "time_embedding.linear_1.": _Place("time_embed.0."),
        "time_embedding.linear_2.": _Place("time_embed.2."),
        "conv_in.": _Place("input_blocks.0.0."),
        "mid_block.resnets.0.": _Place("middle_block.0.", rules=RESIDUAL_RULES),
        "mid_block.attentions.0.": _Place("middle_block.1.", levels - 1, attention),
        "mid_block.resnets.1.": _Place("middle_block.2.", rules=RESIDUAL_RULES),
        "conv_norm_out.": _Place("out.0."),
        "conv_out.": _Place("out.2."),
    }
    for level in range(levels):
        below = levels - 1 - level  # the upward path begins at the lowest resolution
        for count, path, released in ((layers, "down", "input_blocks"), (layers + 1, "up", "output_blocks")):
            for layer in range(count):
                index = level * (layers + 1) + layer + (path == "down")
                there, here = f"{path}_blocks.{level}", f"{released}.{index}"
                places[f"{there}.resnets.{layer}."] = _Place(f"{here}.0.", rules=RESIDUAL_RULES)
                resolution = level if path == "down" else below
                places[f"{there}.attentions.{layer}."] = _Place(f"{here}.1.", resolution, attention)
        places[f"down_blocks.{level}.downsamplers.0.conv."] = _Place(f"input_blocks.{(level + 1) * (layers + 1)}.0.op.")
        behind = 2 if 2**below in config.attention_resolutions else 1
        last = level * (layers + 1) + layers
        places[f"up_blocks.{level}.upsamplers.0.conv."] = _Place(f"output_blocks.{last}.{behind}.conv.")
    return places


def _join_projections(state: dict[str, Tensor], prefix: str, heads: int) -> None:
    """Join queries, keys and values to `qkv`, whose rows are ordered by heads first: [q_h, k_h, v_h] of each head."""
    for kind in ("weight", "bias"):
        names = [f"{prefix}to_{part}.{kind}" for part in "qkv"]
        if all(name in state for name in names):
            parts = [state.pop(name) for name in names]
            split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
            joined = torch.stack(split, dim=1).flatten(0, 2)
            state[f"{prefix}qkv.{kind}"] = as_convolution(joined, 1)
