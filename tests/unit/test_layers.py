"""Quantized layers against the full-precision ones: transposed convolutions, padding modes, half precision."""

import copy
import math

import pytest
import torch
from torch import nn

import qdiff
from qdiff.architecture import Architecture
from qdiff.calibration.compensation import groups_of, output_size, receptive_fields
from qdiff.checkpoint import save_published
from qdiff.config import QuantConfig
from qdiff.engines.cpu import to_integer
from qdiff.engines.cuda import PackedLayer
from qdiff.engines.select import apply_engine
from qdiff.errors import CheckpointError, ConfigError
from qdiff.layers import LAYER_TYPES, ActQuantizer, QuantConv1d, QuantConv2d, QuantConvTranspose2d, QuantLinear
from qdiff.model import enable_activations, quantize_model, set_mode_parameters
from tests.support import golden
from tests.support.engines import quantized_layer
from tests.support.foreign import QUICK

pytestmark = pytest.mark.unit
HALF = [torch.bfloat16, torch.float16]
UPSAMPLERS = [
    (nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 5, 4), {}),
    (nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), padding=1, output_padding=(1, 2), bias=False), (2, 6, 5, 4), {}),
    (nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, dilation=2, groups=3), (2, 6, 5, 4), {}),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), (2, 6, 5, 4), {"output_size": torch.Size([2, 4, 10, 7])}),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), (6, 5, 4), {"output_size": [9, 8]}),
    (nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1), (2, 6, 5), {}),
    (nn.ConvTranspose1d(6, 4, 3, stride=3, groups=2), (2, 6, 5), {"output_size": (17,)}),
]


def quantized(layer: nn.Module, bits: int = 8, x: torch.Tensor | None = None, split: int = 0) -> nn.Module:
    x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0)) if x is None else x
    return quantized_layer(layer, LAYER_TYPES[type(layer)], bits, False, "mse", x, split)


# --- transposed convolutions ---------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "shape", "options"), UPSAMPLERS)
def test_a_transposed_convolution_is_that_of_torch(layer, shape, options):
    x, wrapped = torch.randn(shape), LAYER_TYPES[type(layer)](layer, 8, 8, False)
    assert torch.equal(wrapped(x, **options), layer(x, **options))
    assert torch.equal(wrapped(x, *options.values()), layer(x, **options))


@pytest.mark.parametrize(("layer", "shape", "options"), UPSAMPLERS)
def test_every_output_channel_of_a_transposed_convolution_has_a_scale(layer, shape, options):
    """Channels of very different size are all as exact as 8 bits allow."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    sizes = 10.0 ** torch.arange(layer.out_channels)
    per_group = layer.out_channels // layer.groups
    shaped = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
    shaped *= sizes.view(layer.groups, 1, per_group, *[1] * (layer.weight.dim() - 2))
    if layer.bias is not None:
        layer.bias.zero_()
    x = torch.randn(shape)
    wrapped = quantized(layer, x=x)
    assert wrapped.weight_quantizer.scale.numel() == layer.out_channels
    channels = len(shape) - layer.weight.dim() + 1  # 0 without a batch
    found, expected = (network(x, **options).movedim(channels, 0) for network in (wrapped, layer))
    for one, other in zip(found, expected, strict=True):
        assert golden.relative_error(one, other) < 0.02


def test_a_split_transposed_convolution_has_two_scales():
    """An input whose second half is a thousand times larger: the first half stays exact."""
    x = torch.randn(2, 6, 5, 4)
    x[:, 4:] *= 1000
    layer = nn.ConvTranspose2d(6, 4, 2, stride=2).requires_grad_(False)
    layer.weight[4:] /= 1000
    errors = [golden.relative_error(quantized(layer, 8, x, split)(x), layer(x)) for split in (0, 4)]
    assert errors[1] < 0.02 < errors[0]


def test_engines_take_networks_with_transposed_convolutions():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4)
    conv = quantized(nn.Conv2d(6, 6, 3, padding=1), x=x)
    up = quantized(nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), x=conv(x))
    network = nn.Sequential(conv, nn.GroupNorm(2, 6), nn.SiLU(), up)
    integer = to_integer(network)
    assert isinstance(integer[3], QuantConvTranspose2d) and not isinstance(integer[0], QuantConv2d)
    assert integer(x).shape == network(x).shape
    packed = PackedLayer(copy.deepcopy(up))
    assert torch.equal(packed(x, output_size=(10, 8)), up(x, output_size=(10, 8)))


def test_the_published_format_refuses_transposed_convolutions(tmp_path):
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2))
    architecture = Architecture("own", lambda _: network, {})
    wrapped = quantize_model(network, architecture, QuantConfig())
    with pytest.raises(CheckpointError, match="the published format holds no transposed convolutions, but 0 is one"):
        save_published(tmp_path / "q.pth", wrapped, architecture, network.state_dict(), activations=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *[(layer, shape) for layer, shape, options in UPSAMPLERS if not options],
        (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=3, dilation=1), (2, 6, 7, 6)),
        (nn.Conv2d(6, 9, 3, stride=2, padding=(1, 2), dilation=2, groups=3), (2, 6, 7, 8)),
        (nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 6, 7, 8)),
        (nn.Conv1d(6, 4, 4, padding="same", padding_mode="reflect"), (2, 6, 7)),
        (nn.Linear(6, 4), (2, 5, 6)),
    ],
)
def test_an_output_is_the_product_of_its_receptive_field_with_the_weight(layer, shape):
    """Error-compensating rounding rests on this."""
    x, wrapped = torch.randn(shape), LAYER_TYPES[type(layer)](layer, 8, 8, False)
    with torch.no_grad():
        output = layer(x) if layer.bias is None else layer(x) - _per_channel(layer, layer.bias)
    output = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
    sizes, groups = output_size(wrapped, x), groups_of(wrapped)
    assert list(output.shape[1:-1]) == sizes
    fields = receptive_fields(wrapped, x, torch.arange(len(x) * math.prod(sizes)))
    parts = zip(fields.chunk(groups, dim=1), wrapped.weight.flatten(1).chunk(groups), strict=True)
    found = torch.cat([rows @ weight.T for rows, weight in parts], dim=1)
    assert torch.allclose(found, output.reshape(found.shape), atol=1e-5)


def _per_channel(layer: nn.Module, bias: torch.Tensor) -> torch.Tensor:
    return bias if isinstance(layer, nn.Linear) else bias.view(-1, *[1] * (layer.weight.dim() - 2))


# --- padding modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_are_those_of_torch(mode):
    x = torch.randn(2, 6, 5, 7)
    for layer in (
        nn.Conv2d(6, 4, 3, padding=(1, 2), stride=2, padding_mode=mode),
        nn.Conv2d(6, 4, (2, 3), padding="same", padding_mode=mode),
    ):
        assert torch.equal(QuantConv2d(layer, 8, 8, False)(x), layer(x))
        wrapped = quantized(layer, x=x)
        assert golden.relative_error(wrapped(x), layer(x)) < 0.02
        assert torch.equal(to_integer(nn.Sequential(wrapped))(x), wrapped(x))  # the integer engine leaves it simulated
    line = nn.Conv1d(6, 4, 3, padding=1, padding_mode=mode)
    assert torch.equal(QuantConv1d(line, 8, 8, False)(x[..., 0]), line(x[..., 0]))


# --- half precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_scales_stay_float32_in_half_precision(dtype):
    layer = quantized(nn.Conv2d(6, 4, 3))
    layer.smoothing = torch.rand(6)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert layer.to(dtype) is layer
    state = layer.state_dict()
    assert state.pop("bias").dtype == dtype and before.pop("bias").dtype == torch.float32
    assert set(state) == set(before)
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in state.items()
    )
    assert layer.weight.dtype == layer.dtype == dtype
    back = layer.float()
    assert torch.equal(back.weight, back.weight_quantizer.dequantize()) and back.dtype == torch.float32


def test_double_precision_converts_scales():
    layer = quantized(nn.Linear(6, 4), x=torch.randn(5, 6)).double()
    assert layer.weight.dtype == layer.act_quantizer.scale.dtype == torch.float64
    assert layer.half().act_quantizer.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("learning", [False, True])
def test_activations_are_quantized_in_float32_and_rounded_once(dtype, learning):
    x = torch.randn(64, 6).to(dtype)
    quantizer = ActQuantizer(8, False)
    quantizer.set_qparams(torch.tensor(0.0234567), torch.tensor(113.0))
    quantizer.enabled, quantizer.learning = True, learning
    expected = quantizer(x.float()).to(dtype)
    quantizer.to(dtype)
    assert torch.equal(quantizer(x), expected) and quantizer(x).dtype == dtype
    rounded = ((x / quantizer.scale.to(dtype)).round().clamp(-113, 142) * quantizer.scale).to(dtype)
    assert not torch.equal(rounded, expected)  # the scale in half precision gives other integers


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("split", [0, 2])
def test_a_layer_of_half_precision_computes_with_the_exact_integers(dtype, split):
    """Its weight is that of the float32 layer, rounded once; its input is smoothed and quantized in float32."""
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 4).to(dtype), torch.randn(64, 6).to(dtype)
    exact = copy.deepcopy(linear).float()
    factors = torch.linspace(0.5, 2, 6)
    half, full = (QuantLinear(layer, 4, 8, False, split).requires_grad_(False) for layer in (linear, exact))
    for layer in (half, full):
        layer.smooth(factors)
        layer.init_weight_scales("mse")
        for quantizer in layer.act_quantizers:
            quantizer.set_qparams(torch.tensor(0.0234567), torch.tensor(113.0))
            quantizer.enabled = True
    assert all(
        torch.equal(a.integers, b.integers) and torch.equal(a.scale, b.scale)
        for a, b in zip(half.weight_quantizers, full.weight_quantizers, strict=True)
    )
    assert torch.equal(half.effective_weight(), full.effective_weight().to(dtype))
    assert torch.equal(half.quantize_input(x), full.quantize_input(x.float()).to(dtype))
    assert half(x).dtype == dtype
    assert golden.relative_error(half(x).float(), full(x.float())) < 0.01


@pytest.mark.parametrize("dtype", HALF)
def test_a_network_comes_back_in_the_precision_of_the_model(tmp_path, dtype):
    """The file holds float32: parameters, statistics and the values of the other mode are those of half precision."""

    def network(seed):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.ConvTranspose2d(8, 3, 3))
        layers[1].running_mean.normal_()
        return layers.to(dtype)

    x = torch.randn(8, 3, 6, 6).to(dtype)
    quantized = qdiff.quantize(network(0), (x,), **QUICK)
    set_mode_parameters(quantized, {"0.bias": torch.randn(8).to(dtype)})
    outputs = [quantized(x)]
    qdiff.save(tmp_path / "q.safetensors", quantized)
    enable_activations(quantized, False)
    outputs.append(quantized(x))
    loaded = qdiff.load(tmp_path / "q.safetensors", model=network(1), device="cpu", engine="simulated")
    for activations, output in zip((True, False), outputs, strict=True):
        enable_activations(loaded, activations)
        assert loaded(x).dtype == dtype and torch.equal(loaded(x), output)
    exact = qdiff.load(tmp_path / "q.safetensors", model=network(1).float(), device="cpu")
    assert exact(x.float()).dtype == torch.float32
    assert 0 < golden.relative_error(outputs[0].float(), exact(x.float())) < 0.02


def test_the_integer_engine_leaves_half_precision_to_the_simulation():
    network = nn.Sequential(quantized(nn.Conv2d(6, 4, 3))).bfloat16()
    with pytest.raises(ConfigError, match="integer: the network is in bfloat16"):
        apply_engine(network, "integer")
    assert apply_engine(network, "auto") is network
    x = torch.randn(2, 6, 5, 4).bfloat16()
    assert torch.equal(PackedLayer(copy.deepcopy(network[0]))(x), network(x))


def test_autocast_keeps_its_arithmetic():
    """Under autocast a half-precision activation is divided by the scale in half precision, as it was before."""
    x, quantizer = torch.randn(64, 6).bfloat16(), ActQuantizer(8, True)
    quantizer.set_qparams(torch.tensor(0.0234567), torch.tensor(0.0))
    quantizer.enabled = True
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(x)
    assert torch.equal(found, torch.div(x, quantizer.scale).round_().clamp_(-128, 127).mul_(quantizer.scale))
    assert not torch.equal(found, quantizer(x))
