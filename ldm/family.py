"""What quantization must know about the latent family: LSUN and other latent diffusion, and Stable Diffusion."""

from dataclasses import asdict
from typing import Any, cast

from torch import nn

from ldm.attention import AttentionBlock, BasicTransformerBlock, CrossAttention, QKVAttention
from ldm.unet import ResBlock, UNetConfig, UNetModel, unet_config
from qdiff.architecture import Architecture, AttentionMatMulSpec


def split_points(unet: nn.Module) -> dict[str, int]:
    """Find the shortcuts whose input is a concatenation [h, skip].

    Args:
        unet: a full-precision `UNetModel`.

    Returns:
        The path of each shortcut with the number of channels of h.
    """
    assert isinstance(unet, UNetModel)
    points: dict[str, int] = {}
    current = cast(ResBlock, unet.middle_block[-1]).out_channels
    for index, layers in enumerate(unet.output_blocks):
        block = cast(ResBlock, cast(nn.ModuleList, layers)[0])
        if isinstance(block.skip_connection, nn.Conv2d):
            points[f"output_blocks.{index}.0.skip_connection"] = current
        current = block.out_channels
    return points


def make_unet(config: dict[str, Any]) -> nn.Module:
    """Make the UNet, with fresh weights, from the configuration that a packed checkpoint stores."""
    return UNetModel(unet_config(config))


def unet_config_dict(config: UNetConfig) -> dict[str, Any]:
    """Return the configuration as a packed checkpoint stores it."""
    return asdict(config)


LATENT = Architecture(
    name="latent",
    make_unet=make_unet,
    blocks={ResBlock: "out_layers.3", AttentionBlock: "proj_out", BasicTransformerBlock: "ff.net.2"},
    separate=("emb_layers.1",),
    attention_matmuls={
        QKVAttention: {
            "qkv_matmul": AttentionMatMulSpec(("q", "k")),
            "smv_matmul": AttentionMatMulSpec(("w", "v"), softmax="w", always_zero=True, follows_a_sym=False),
        },
        CrossAttention: {
            "qk": AttentionMatMulSpec(("q", "k"), on_block=True),
            "av": AttentionMatMulSpec(("w", "v"), softmax="w", always_zero=True, on_block=True),
        },
    },
    split_points=split_points,
    signatures=("time_embed.0.weight", "input_blocks."),
    input_layer="input_blocks.0.0",
)
