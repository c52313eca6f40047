"""What quantization must know of the pixel family."""

from dataclasses import asdict

from torch import nn

from ddim.config import ModelConfig, model_config_from_dict
from ddim.unet import AttnBlock, ResnetBlock, UNet
from qdiff.architecture import Architecture, AttentionMatMulSpec, register_family


def split_points(unet: UNet) -> dict[str, int]:
    """The shortcuts that see a concatenation [h, skip], with the channels of h."""
    points = {}
    current = unet.mid.block_2.conv2.out_channels
    for level in reversed(range(len(unet.up))):
        for index, block in enumerate(unet.up[level].block):
            if hasattr(block, "nin_shortcut"):
                points[f"up.{level}.block.{index}.nin_shortcut"] = current
            current = block.conv2.out_channels
    return points


def build(config: dict) -> nn.Module:
    return UNet(model_config_from_dict(config))


def describe(config: ModelConfig) -> dict:
    """The configuration as stored in a packed checkpoint."""
    return asdict(config)


PIXEL = register_family(
    Architecture(
        name="pixel",
        build=build,
        blocks={ResnetBlock: "conv2", AttnBlock: "proj_out"},
        separate=("temb_proj",),
        products={
            AttnBlock: {
                "qk": AttentionMatMulSpec(("q", "k"), on_block=True),
                "av": AttentionMatMulSpec(("v", "w"), softmax="w", on_block=True),
            }
        },
        split_points=split_points,
        signature="temb.dense.0.weight",
        input_layer="conv_in",
    )
)
