"""A trained network that this project did not make: the UNet of the PyPI package adaptive-terrain-diffusion.

The package ships a one-step consistency model of terrain heights as an ONNX file. Its network is the UNet of
guided-diffusion (Dhariwal and Nichol 2021, arXiv 2105.05233), rebuilt here from plain PyTorch as that project writes
it: attention by einsum, shortcuts concatenated in `forward`, nothing prepared for quantization. The parameters keep
their names.
"""

import ast
import importlib.util
import re
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.errors import ConfigError

PACKAGE, VERSION = "adaptive-terrain-diffusion", "0.4.2"
WIDTH, MULTIPLES, NUM_BLOCKS, ATTENTION_AT, HEAD = 32, (1, 1, 2, 3, 4), 4, (4, 8, 16), 32
EMBEDDING = 4 * WIDTH
TOLERANCE = 1e-5  # relative difference from onnxruntime


class GroupNorm32(nn.GroupNorm):
    """A GroupNorm of 32 groups that always runs in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class Upsample(nn.Module):
    """Double the resolution by the nearest neighbor."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Downsample(nn.Module):
    """Halve the resolution by average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.op = nn.AvgPool2d(2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by the embedding.

    Args:
        channels: channels of the input.
        out_channels: channels of the output.
        resample: makes the layer that changes the resolution, once for each of the two paths.
    """

    def __init__(self, channels: int, out_channels: int, resample: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.h_upd, self.x_upd = resample(), resample()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, 2 * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, H, W] and emb [N, EMBEDDING] give [N, out_channels, H', W']."""
        in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
        h = in_conv(self.h_upd(in_rest(x)))
        x = self.x_upd(x)
        emb_out = self.emb_layers(emb)[:, :, None, None]
        out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        h = out_rest(out_norm(h) * (1 + scale) + shift)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Multi-head attention of a [N, 3 * C, T] tensor of queries, keys and values."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        channels = width // (3 * self.num_heads)
        q, k, v = qkv.chunk(3, dim=1)
        scale = channels**-0.25
        shape = batch * self.num_heads, channels, length
        weight = torch.einsum("bct,bcs->bts", (q * scale).view(shape), (k * scale).view(shape))
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v.reshape(shape)).reshape(batch, -1, length)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.attention = QKVAttention(channels // HEAD)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        h = self.attention(qkv.reshape(len(x), -1, x.shape[2] * x.shape[3]))
        return x + self.proj_out(h.reshape(x.shape))


class TimestepEmbedSequential(nn.Sequential):
    """A Sequential that hands the embedding to its residual blocks."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    """The network F of the consistency model; see `terrain.denoise` for the model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label_emb = nn.Sequential(nn.Linear(1, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(1, WIDTH, 3, padding=1))])
        skips, channels, factor = [WIDTH], WIDTH, 1
        for multiple in MULTIPLES:
            for _ in range(NUM_BLOCKS):
                self.input_blocks.append(_level(channels, multiple * WIDTH, factor))
                channels = multiple * WIDTH
                skips.append(channels)
            if multiple is not MULTIPLES[-1]:
                self.input_blocks.append(TimestepEmbedSequential(ResBlock(channels, channels, Downsample)))
                skips.append(channels)
                factor *= 2
        self.middle_block = TimestepEmbedSequential(
            ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels)
        )
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(MULTIPLES))):
            for number in range(NUM_BLOCKS + 1):
                block = _level(channels + skips.pop(), multiple * WIDTH, factor)
                channels = multiple * WIDTH
                if level and number == NUM_BLOCKS:
                    block.append(ResBlock(channels, channels, Upsample))
                    factor //= 2
                self.output_blocks.append(block)
        self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            x: the scaled noisy terrain, [N, 1, 128, 128].
            timesteps: [N].
            y: the difficulty in [0, 1], [N].

        Returns:
            [N, 1, 128, 128].
        """
        emb = self.time_embed(timestep_embedding(timesteps, WIDTH)) + self.label_emb(y[:, None])
        hs = []
        h = x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        return self.out(h)


def _level(channels: int, out_channels: int, factor: int) -> TimestepEmbedSequential:
    """A residual block, with attention where the resolution was divided by one of ATTENTION_AT."""
    block = TimestepEmbedSequential(ResBlock(channels, out_channels))
    if factor in ATTENTION_AT:
        block.append(AttentionBlock(out_channels))
    return block


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embeddings of time steps [N]: [N, width], cosines first."""
    frequencies = 10000 ** (-torch.arange(width // 2, device=timesteps.device) / (width // 2))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def onnx_file() -> Path:
    """The ONNX file of the installed package.

    Raises:
        ConfigError: the package, onnx or onnxruntime is not installed, or the package has another version.
    """
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed: expected after pip install {' '.join(missing)}")
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        version = "none"
    found = importlib.util.find_spec("terrain_diffusion")
    if version != VERSION or found is None or found.origin is None:
        raise ConfigError(
            f"{PACKAGE} {VERSION}: found {version}, expected it after pip install --no-deps {PACKAGE}=={VERSION}"
        )
    return Path(found.origin).parent / "weights/terrain_consistency_unet_difficulty100.onnx"


def read_weights(file: Path) -> dict[str, Tensor]:
    """The parameters of the network, by the names of `UNetModel`.

    The export kept the names of convolutions and linear layers. It wrote a GroupNorm as InstanceNormalization with a
    product and a sum, whose constants have no names. The scopes of these two nodes end with the path of the norm and
    the name of the operation.
    """
    import onnx

    graph = onnx.load(file).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: value for name, value in tensors.items() if name.startswith("network.")}
    for node in graph.node:
        properties = {item.key: item.value for item in node.metadata_props}
        scopes = ast.literal_eval(properties.get("pkg.torch.onnx.name_scopes", "['']"))
        kind = {"Mul": "weight", "Add": "bias"}.get(node.op_type)
        if kind and scopes[-1].startswith("group_norm"):
            path = re.sub(r"\.slice\(.*\)", "", scopes[-2])  # in_layers[:-1] is called as a module of its own
            weights[f"{path}.{kind}"] = tensors[node.input[1]].reshape(-1)
    return {name.removeprefix("network."): torch.from_numpy(value.copy()) for name, value in weights.items()}


def make_network(weights: dict[str, Tensor]) -> UNetModel:
    """The network with the given parameters, in eval mode, without gradients."""
    network = UNetModel()
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
