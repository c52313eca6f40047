"""What quantization must know of the latent family: LSUN and other latent diffusion, Stable Diffusion."""

from dataclasses import asdict

from torch import nn

from ldm.attention import AttentionBlock, BasicTransformerBlock, CrossAttention, QKVAttention
from ldm.unet import ResBlock, UNetConfig, UNetModel, unet_config
from qdiff.architecture import Architecture, AttentionMatMulSpec, register_family


def split_points(unet: UNetModel) -> dict[str, int]:
    """The shortcuts that see a concatenation [h, skip], with the channels of h."""
    points = {}
    current = unet.middle_block[2].out_layers[3].out_channels
    for index, layers in enumerate(unet.output_blocks):
        if isinstance(layers[0].skip_connection, nn.Conv2d):
            points[f"output_blocks.{index}.0.skip_connection"] = current
        current = layers[0].out_layers[3].out_channels
    return points


def build(config: dict) -> nn.Module:
    return UNetModel(unet_config(config))


def describe(config: UNetConfig) -> dict:
    """The configuration as stored in a packed checkpoint."""
    return asdict(config)


LATENT = register_family(
    Architecture(
        name="latent",
        build=build,
        blocks={ResBlock: "out_layers.3", AttentionBlock: "proj_out", BasicTransformerBlock: "ff.net.2"},
        separate=("emb_layers.1",),
        products={
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
        signature="time_embed.0.weight",
        input_layer="input_blocks.0.0",
    )
)
