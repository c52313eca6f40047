"""A U-Net as a student writes it: one call quantizes it, or one error says what to add."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdiff
from qdiff.engines.cpu import to_integer
from qdiff.evaluation.cost import measure_cost
from qdiff.layers import QuantConvTranspose2d
from qdiff.model import quant_layers
from tests.support import golden

pytestmark = pytest.mark.cli


class TimeEmbedding(nn.Module):
    """Sinusoidal time steps, and a small network on top of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.width // 2) / (self.width // 2))
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1).to(self.mlp[0].weight.dtype))


class DoubleConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out)
        self.emb = nn.Linear(emb, c_out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x))) + self.emb(emb)[:, :, None, None]
        return F.relu(self.bn2(self.conv2(x)))


class SelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + tokens.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """Two resolutions below the first, transposed convolutions on the way up, concatenated shortcuts."""

    def __init__(self, width: int = 16, emb: int = 32) -> None:
        super().__init__()
        self.time = TimeEmbedding(emb)
        self.pool = nn.MaxPool2d(2)
        self.inc, self.down1 = DoubleConv(3, width, emb), DoubleConv(width, 2 * width, emb)
        self.down2, self.attention = DoubleConv(2 * width, 4 * width, emb), SelfAttention(4 * width)
        self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.conv1 = DoubleConv(4 * width, 2 * width, emb)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.conv2, self.out = DoubleConv(2 * width, width, emb), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        x1 = self.inc(x, emb)
        x2 = self.down1(self.pool(x1), emb)
        x3 = self.attention(self.down2(self.pool(x2), emb))
        x = self.conv1(torch.cat([self.up1(x3), x2], dim=1), emb)
        x = self.conv2(torch.cat([self.up2(x), x1], dim=1), emb)
        return self.out(x)


def network(seed: int) -> UNet:
    """A network with the statistics of a trained one, in training mode, as it is after training."""
    torch.manual_seed(seed)
    unet = UNet()
    x, t = torch.randn(64, 3, 16, 16), torch.randint(0, 1000, (64,))
    with torch.no_grad():
        for _ in range(30):
            unet(x, t)
    return unet


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(48, 3, 16, 16, generator=generator)
    return x, torch.randint(0, 1000, (48,), generator=generator)


QUICK = {"iters": 4, "iters_a": 2, "iters_tune": 2, "batch_size": 16}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_one_call_and_what_its_error_says(samples, tmp_path, dtype):
    unet = network(0).to(dtype)
    x, t = samples[0].to(dtype), samples[1]
    with pytest.raises(TypeError) as error:
        qdiff.quantize(unet, (x, t))
    head, *lines = str(error.value).splitlines()
    assert len(lines) == 1 and "attention.attention: MultiheadAttention" in lines[0]
    keep = eval(re.search(r"keep=(\[.*?\])", head)[1])
    assert keep == ["MultiheadAttention"]
    quantized = qdiff.quantize(unet, (x, t), keep=keep, **QUICK)
    layers = quant_layers(quantized)
    assert isinstance(layers["up1"], QuantConvTranspose2d) and isinstance(layers["up2"], QuantConvTranspose2d)
    assert not any("attention" in path for path in layers) and len(layers) == 2 * 5 + 5 + 2 + 2 + 1
    assert unet.training
    with torch.no_grad():
        expected, found = unet.eval()(x, t), quantized(x, t)
        assert found.dtype == dtype and golden.relative_error(found.float(), expected.float()) < 0.1
    qdiff.save(tmp_path / "q.safetensors", quantized)
    loaded = qdiff.load(tmp_path / "q.safetensors", model=network(1).to(dtype), device="cpu", engine="simulated")
    state, own = loaded.state_dict(), quantized.state_dict()
    assert set(state) == set(own)
    for name, tensor in state.items():
        assert tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(x, t), found)


def test_its_cost_and_the_integer_engine(samples):
    unet = network(0)
    quantized = qdiff.quantize(
        unet, samples, keep=["MultiheadAttention"], preset="published", iters=0, iters_a=0, iters_tune=0
    )
    one = tuple(part[:1] for part in samples)
    width, emb = 16, 32
    pixels = 16 * 16
    conv = [(3, 1, pixels), (1, 2, pixels // 4), (2, 4, pixels // 16), (4, 2, pixels // 4), (2, 1, pixels)]
    macs = sum(size * 9 * width * out * ((c if c == 3 else c * width) + out * width) for c, out, size in conv)
    macs += sum(emb * out * width for _, out, _ in conv) + 2 * emb * emb + pixels * width * 3
    macs += pixels // 16 * 4 * width * 2 * width * 4 + pixels // 4 * 2 * width * width * 16
    tokens, channels = pixels // 16, 4 * width
    attention = 4 * tokens * channels * channels + 2 * tokens * tokens * channels
    cost = measure_cost(quantized, one)
    assert (cost.macs, cost.bops) == (macs + attention, macs * 8 * 8 + attention * 32 * 32)
    integer = to_integer(quantized)
    with torch.inference_mode():
        expected, simulated = unet.eval()(*samples), quantized(*samples)
        # values on the edge between two integers fall to the other side now and then
        difference = golden.relative_error(integer(*samples), simulated)
        assert difference < 0.3 * golden.relative_error(simulated, expected)
