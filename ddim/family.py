"""What quantization must know about the pixel family."""

from dataclasses import asdict
from typing import Any, cast

from torch import nn

from ddim.config import ModelConfig, model_config_from_dict
from ddim.unet import AttnBlock, ResnetBlock, UNet, levels_of
from qdiff.architecture import Architecture, AttentionMatMulSpec


def split_points(unet: nn.Module) -> dict[str, int]:
    """Find the shortcuts whose input is a concatenation [h, skip].

    Args:
        unet: a full-precision `UNet`.

    Returns:
        The path of each shortcut with the number of channels of h.
    """
    assert isinstance(unet, UNet)
    points: dict[str, int] = {}
    current = unet.mid.block_2.out_channels
    for index, level in reversed(list(enumerate(levels_of(unet.up)))):
        for number, block in enumerate(cast(list[ResnetBlock], list(level.block))):
            if hasattr(block, "nin_shortcut"):
                points[f"up.{index}.block.{number}.nin_shortcut"] = current
            current = block.out_channels
    return points


def make_unet(config: dict[str, Any]) -> nn.Module:
    """Make the UNet, with fresh weights, from the configuration that a packed checkpoint stores."""
    return UNet(model_config_from_dict(config))


def unet_config_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the configuration as a packed checkpoint stores it."""
    return asdict(config)


PIXEL = Architecture(
    name="pixel",
    make_unet=make_unet,
    blocks={ResnetBlock: "conv2", AttnBlock: "proj_out"},
    separate=("temb_proj",),
    attention_matmuls={
        AttnBlock: {
            "qk": AttentionMatMulSpec(("q", "k"), on_block=True),
            "av": AttentionMatMulSpec(("v", "w"), softmax="w", on_block=True),
        }
    },
    split_points=split_points,
    signatures=("temb.dense.0.weight",),
    input_layer="conv_in",
)
