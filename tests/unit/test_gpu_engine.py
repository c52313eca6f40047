"""Networks on the Triton kernels, in the interpreter, against the simulation in float64; what falls back, and why."""

import copy
import statistics
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdiff
from ldm.family import LATENT
from ldm.unet import UNetConfig, UNetModel
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig
from qdiff.engines.cuda import PackedLayer
from qdiff.layers import ActQuantizer, QuantConv1d, QuantConv2d, QuantLinear, QuantMatMul
from tests.support import golden, tiny
from tests.support.attentions import FusedAttention
from tests.support.engines import LINEAR, attention_matmul, factors, network_of, network_of_policy, quantized_layer
from tests.support.interpreter import launches, layers

SMALL = {"image_size": 8, "ch_mult": (1,), "attn_resolutions": ()}  # one attention, in the middle


@pytest.fixture
def launched(monkeypatch):
    """The names of the operators that are launched, with the names of the pointwise work in a quantization."""
    names = []

    def spy(name):
        original = getattr(launches, name)

        def launch(*args, **named):
            work = [key for key, value in named.items() if value is not None and value is not False]
            names.append((name, *work) if name == "quantize" else (name,))
            return original(*args, **named)

        monkeypatch.setattr(launches, name, launch)

    for name in ("quantize", "product", "group_norm_map", "attention"):
        spy(name)
    return names


def errors(simulated: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[float], list[float]]:
    """The relative errors of the integer network and of the simulation in float32, for each sample of a batch."""
    reference = copy.deepcopy(simulated).double()(*(part.double() for part in inputs))
    found = layers.to_integer(simulated)(*inputs)
    assert type(found) is Tensor and found.shape == reference.shape and found.dtype == torch.float32
    float32 = simulated(*inputs)
    return tuple(
        [golden.relative_error(*pair) for pair in zip(output, reference, strict=True)] for output in (found, float32)
    )


def assert_as_near_as_float32(simulated: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The bound of the CPU engine: the median error is at most 1.5 times that of the float32 simulation."""
    integer, float32 = errors(simulated, inputs)
    assert statistics.median(integer) <= 1.5 * statistics.median(float32), (integer, float32)


def small_latent(kind: str) -> tuple[nn.Module, CalibrationData]:
    """A latent network with one attention, `none`, or one transformer, `text`; and its calibration samples."""
    torch.manual_seed(0)
    text = {"use_spatial_transformer": True, "context_dim": 16} if kind == "text" else {}
    network = UNetModel(UNetConfig(4, 4, 16, (), 1, (1,), num_heads=2, norm_groups=4, **text))
    inputs = [torch.randn(16, 4, 4, 4), torch.linspace(0, 999, 16), torch.randn(16, 8, 16)]
    return network.eval().requires_grad_(False), CalibrationData(tuple(inputs if text else inputs[:2]))


class Chain(nn.Module):
    """Convolutions of 4 bits, of 3 bits and of 8 bits."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.first = quantized_layer(nn.Conv2d(64, 32, 3, padding=1), QuantConv2d, 4, False, "max", x)
        self.second = quantized_layer(nn.Conv2d(32, 64, 1), QuantConv2d, 3, False, "max", x[:, :32])
        self.third = quantized_layer(nn.Conv2d(64, 40, 3), QuantConv2d, 8, False, "max", x)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


@torch.no_grad()
def test_packed_weights_give_the_same_bits_in_half_the_memory(launched):
    """Layers of 8 bits, and zero points that are no 4-bit integers, keep a byte for each weight."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 6, 6)
    network = Chain(x)
    expanded, packed = layers.to_integer(network), layers.to_integer(network, packed=True)
    assert torch.equal(packed(x), expanded(x)) and launched.count(("product",)) == 6
    weights = [[found.get_submodule(name).parts[0].flat for found in (expanded, packed)] for name, _ in WEIGHTS]
    assert [(new.dtype, new.numel() / old.numel()) for old, new in weights] == [kind for _, kind in WEIGHTS]
    assert all(torch.equal(packed.get_submodule(n).weight, expanded.get_submodule(n).weight) for n, _ in WEIGHTS)
    network.first.weight_quantizer.zero_point -= 20
    assert layers.to_integer(network, packed=True).first.parts[0].nibble_zero is None


# the type and the size of a packed weight; the second layer has 32 input channels, which are stored as 64
WEIGHTS = (("first", (torch.uint8, 0.5)), ("second", (torch.uint8, 1.0)), ("third", (torch.int8, 1.0)))


# --- networks --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("kind", "symmetric", "sm_abit"), [("none", False, 8), ("text", True, 16)])
def test_small_latent_networks_are_as_near_to_float64_as_float32_is(kind, symmetric, sm_abit, launched):
    network, rows = small_latent(kind)
    quant = replace(LINEAR, a_sym=symmetric, sm_abit=sm_abit)
    simulated = Calibration(network, LATENT, quant, CalibrationConfig(), rows).run()
    assert_as_near_as_float32(simulated, tuple(part[::8] for part in rows.inputs))
    works = set(launched)
    assert {("quantize", "a", "b", "silu"), ("attention",), ("product",), ("group_norm_map",)} <= works
    if kind == "text":
        assert {("quantize", "a", "b", "layer_norm"), ("quantize", "geglu")} <= works
    assert set(layers.find_obstacles(simulated).values()) == {None}


@torch.no_grad()
def test_a_whole_network_with_packed_weights_gives_the_same_bits():
    """Split shortcuts, linear layers, and inputs of 16 bits, which take two products."""
    simulated, rows, _ = network_of_policy((("*.temb_proj", "A16"),), replace(tiny.MODEL, **SMALL))
    inputs = tuple(part[:2] for part in rows.inputs)
    expanded, packed = (layers.to_integer(simulated, packed=packed) for packed in (False, True))
    assert layers.count_packed(packed) > 8 and not layers.count_packed(expanded)
    assert torch.equal(packed(*inputs), expanded(*inputs))


POLICY = (
    ("conv_out", "keep"),
    ("*.temb_proj", "A9"),
    ("mid.block_1.conv1", "W8A16"),
    ("mid.block_2.conv1", "W8"),
    ("up.0.block.0.conv1", "A16"),
)


@torch.no_grad()
def test_a_pixel_network_with_a_policy_smoothing_and_timestep_groups(launched):
    """Samples of several groups in one batch cannot share a launch: they are simulated."""
    simulated, rows, _ = network_of_policy(POLICY, replace(tiny.MODEL, **SMALL), grouped=True)
    integer = layers.to_integer(simulated)
    assert type(integer.conv_out) is nn.Conv2d and set(layers.find_obstacles(simulated).values()) == {None}
    exact = copy.deepcopy(simulated).double()
    groups = set()
    for chosen, mixed in ((slice(0, 1), False), (slice(48, 49), False), (slice(0, None, 21), True)):
        launched.clear()
        inputs = tuple(part[chosen] for part in rows.inputs)
        found, expected = integer(*inputs), exact(*(part.double() for part in inputs))
        assert golden.relative_error(found, expected) < 1e-3
        groups.add(integer.group_index.index.item())
        assert any(name == "product" for name, *_ in launched) != mixed
    assert len(groups) == 2


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("kind", "bits", "symmetric"), [*product(("pixel", "none", "text"), (4, 8), (True, False))])
def test_whole_networks_are_as_near_to_float64_as_float32_is(kind, bits, symmetric, tmp_path):
    network, architecture, rows = network_of(kind, tmp_path)
    quant = replace(LINEAR, weight_bit=bits, a_sym=symmetric, sm_abit=16 if symmetric else 8)
    simulated = Calibration(network, architecture, quant, CalibrationConfig(), rows).run()
    assert_as_near_as_float32(simulated, tuple(part[::8] for part in rows.inputs))


class Block(nn.Module):
    """A transformer block that knows nothing of this project, with quantized layers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        x, wide = torch.randn(64, width) * 2, torch.randn(64, 2 * width)

        def linear(c: int, oc: int, like: Tensor, **options) -> QuantLinear:
            return quantized_layer(nn.Linear(c, oc), QuantLinear, 4, False, "max", like, **options)

        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2)).requires_grad_(False)
        self.first = linear(width, width, x, smoothing=factors(width))
        self.second = linear(width, width, wide[:, :width])
        self.gated, self.last = linear(width, 4 * width, x), linear(2 * width, width, wide)
        for norm in self.norms:
            norm.weight.normal_(1, 0.1), norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(torch.tanh(self.first(self.norms[0](x))))
        value, gate = self.gated(self.norms[1](x)).chunk(2, dim=-1)
        return self.last(value * F.gelu(gate)) + x


@torch.no_grad()
def test_a_foreign_transformer_block(launched):
    block = Block()
    assert_as_near_as_float32(block, (torch.randn(2, 9, 24),))
    quantizations = [work for name, *work in launched if name == "quantize"]
    norm = ["a", "b", "layer_norm"]
    assert [sorted(work) for work in quantizations] == [[*norm[:2], "divisor", "layer_norm"], [], norm, ["geglu"]]
    launched.clear()
    assert layers.to_integer(block)(torch.randn(2, 0, 24)).shape == (2, 0, 24) and not launched
    assert layers.to_integer(block).double()(torch.randn(1, 2, 24).double()).dtype == torch.float64 and not launched


class Changing(nn.Module):
    """A network that changes an activation in place between a normalization and the layer after it."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm.requires_grad_(False), layer

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        x += 1
        return self.layer(normal)


@torch.no_grad()
def test_a_change_in_place_after_a_normalization_raises():
    torch.manual_seed(0)
    image, tokens = torch.randn(1, 8, 4, 4), torch.randn(1, 5, 8)
    conv = quantized_layer(nn.Conv2d(8, 8, 1), QuantConv2d, 4, False, "max", image)
    linear = quantized_layer(nn.Linear(8, 8), QuantLinear, 4, False, "max", tokens)
    for norm, layer, x in ((nn.GroupNorm(2, 8), conv, image), (nn.LayerNorm(8), linear, tokens)):
        network = layers.to_integer(Changing(norm, layer))
        with pytest.raises(RuntimeError, match="changed in place between its normalization and the product after it"):
            network(x)


# --- what falls back -------------------------------------------------------------------------------


def conv(zero: float | None = None, bits: int = 8, **geometry) -> QuantConv2d:
    torch.manual_seed(0)
    layer = quantized_layer(
        nn.Conv2d(12, 12, **{"kernel_size": 3} | geometry), QuantConv2d, bits, False, "max", torch.randn(2, 12, 5, 5)
    )
    if zero is not None:
        layer.act_quantizer.set_qparams(layer.act_quantizer.scale, torch.tensor(zero))
    return layer


def conv1d(**geometry) -> QuantConv1d:
    return quantized_layer(nn.Conv1d(8, 8, **geometry), QuantConv1d, 4, False, "max", torch.randn(2, 8, 9))


def not_quantized(layer: QuantConv2d) -> QuantConv2d:
    layer.act_quantizer.enabled = False
    return layer


class Other(QuantLinear):
    """A layer that this project does not know."""


OBSTACLES = [
    (lambda: conv(padding=1), None),
    (lambda: conv(1e5), None),
    (lambda: conv(padding="same", dilation=2), None),
    (lambda: conv1d(kernel_size=1), None),
    (lambda: conv(padding=1, groups=4), "groups of channels"),
    (lambda: conv(padding=1, padding_mode="reflect"), "padding that is not with zeros"),
    (lambda: conv1d(kernel_size=3), "a 1-D convolution that is no linear map"),
    (lambda: conv1d(kernel_size=1, stride=2), "a 1-D convolution that is no linear map"),
    (lambda: conv(bits=12), "weights of more than 8 bits"),
    (lambda: not_quantized(conv()), "activations that are not quantized"),
    (lambda: conv(100.5), "fractional zero points"),
    (lambda: conv(256, padding=1), "zero points beyond a byte, with padding"),
    (lambda: conv(-1, padding=1), "zero points beyond a byte, with padding"),
    (lambda: conv(1e6), "sums beyond 32 bits"),
    (
        lambda: quantized_layer(nn.Linear(8, 8), Other, 4, False, "max", torch.randn(4, 8)),
        "no integer form of Other",
    ),
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("index", range(len(OBSTACLES)))
def test_what_has_no_integer_form_is_named_and_stays_packed(index):
    make, text = OBSTACLES[index]
    network = nn.Sequential(make())
    assert layers.find_obstacles(network) == {"0": text}
    integer = layers.to_integer(network)
    assert isinstance(integer[0], PackedLayer if text else layers.IntegerProduct)
    assert not isinstance(network[0], PackedLayer | layers.IntegerProduct)


@torch.no_grad()
def test_a_layer_with_a_hook_stays_simulated():
    network = nn.Sequential(conv(padding=1))
    network[0].register_forward_hook(lambda *_: None)
    assert layers.find_obstacles(network) == {"0": "a hook"}
    assert type(layers.to_integer(network)[0]) is QuantConv2d


def matmuls(
    zero: float = 120, qk_bits: int = 8, enabled: bool = True, hooked: bool = False
) -> tuple[QuantMatMul, QuantMatMul]:
    qk, av = QuantMatMul({"q": ActQuantizer(qk_bits, False), "k": ActQuantizer(8, False)}), attention_matmul(False, 16)
    for quantizer in (*qk.act_quantizers, *av.act_quantizers):
        quantizer.set_qparams(torch.tensor(0.02), torch.tensor(zero))
        quantizer.enabled = enabled
    if hooked:
        av.register_forward_hook(lambda *_: None)
    return qk, av


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, None),
        ({"zero": 255}, None),
        ({"hooked": True}, "a hook"),
        ({"enabled": False}, "operands that are not quantized"),
        ({"qk_bits": 12}, "operands of more than 8 bits"),
        ({"zero": 120.5}, "fractional zero points"),
        ({"zero": 256}, "zero points beyond a byte"),
    ],
)
def test_attentions_that_have_no_integer_form_are_named(options, text):
    assert layers.IntegerAttention.find_obstacle(*matmuls(**options)) == text


class Attending(nn.Module):
    """Attention by PyTorch's operator to itself, to a context, and with a mask, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross, self.masked = FusedAttention(16), FusedAttention(16), FusedAttention(16)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        x = x + self.own(x)
        x = x + self.cross(x, context)
        return x + self.masked(x, context, mask)


@torch.no_grad()
def test_attentions_of_function_calls_run_in_the_kernel_unless_they_have_a_mask(launched):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 10, 16), torch.randn(2, 7, 16), torch.rand(2, 1, 10, 7) > 0.3)
    simulated = qdiff.quantize(
        Attending().eval(), inputs, weight_bit=4, act_bit=8,
        rounding="nearest", iters_tune=0, policy_budget=0, smoothing=False,
    )  # fmt: skip
    obstacles = layers.find_obstacles(simulated)
    assert {f"{name}.matmul_0" for name in ("own", "cross", "masked")} <= set(obstacles)
    network = layers.to_integer(simulated, obstacles)
    exact = copy.deepcopy(simulated).double()(*(part.double() if part.is_floating_point() else part for part in inputs))
    for prepared in (network, copy.deepcopy(network)):
        launched.clear()
        assert golden.relative_error(prepared(*inputs).double(), exact) < 1e-6
        assert launched.count(("attention",)) == 2
    assert layers.find_obstacles(Chain(torch.randn(2, 64, 6, 6))) == dict.fromkeys(("first", "second", "third"))


class Plain(nn.Module):
    """Attention to itself by PyTorch's operator, without projections."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x * 0.5, x + 1)


@torch.no_grad()
@pytest.mark.parametrize(("shape", "launches_of_all"), [((3, 6, 32), 1), ((3, 1, 6, 320), 0)])
def test_attentions_without_heads_run_in_the_kernel_and_large_heads_in_slices(
    shape, launches_of_all, launched, monkeypatch
):
    torch.manual_seed(0)
    x = torch.randn(shape)
    simulated = qdiff.quantize(
        nn.Sequential(nn.Linear(shape[-1], shape[-1]), Plain()).eval(), [x], weight_bit=4, act_bit=8,
        rounding="nearest", iters_tune=0, policy_budget=0, smoothing=False,
    )  # fmt: skip
    network, sizes = layers.to_integer(Outer(simulated)), []
    monkeypatch.setattr("qdiff.attention.SLICE_BYTES", 1)
    for module in network.modules():
        if isinstance(module, QuantMatMul):
            module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    exact = copy.deepcopy(simulated).double()(x.double())
    assert golden.relative_error(network(x).double(), exact) < 1e-6
    assert launched.count(("attention",)) == launches_of_all and sizes == ([] if launches_of_all else [1] * 6)


class Outer(nn.Module):
    """A network around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Reshaped(nn.Module):
    """A 1-D convolution over pixels whose result becomes an image again, before a convolution and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        x = torch.randn(2, 32, 6, 6)
        self.first = quantized_layer(nn.Conv1d(32, 32, 1), QuantConv1d, 4, False, "max", x.flatten(2))
        self.second = quantized_layer(nn.Conv2d(32, 32, 3, padding=1), QuantConv2d, 4, False, "max", x)

    def forward(self, x):
        n, c, h, w = x.shape
        return self.second(self.first(x.reshape(n, c, h * w)).reshape(n, c, h, w))


class Floating(nn.Module):
    """A residual block whose first convolution is in full precision; the embedding is added twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.second = quantized_layer(
            nn.Conv2d(32, 32, 3, padding=1), QuantConv2d, 4, False, "max", torch.randn(2, 32, 6, 6)
        )

    def forward(self, x):
        emb = x.mean((2, 3))[:, :, None, None]
        return x + self.second(nn.functional.silu(self.norm(self.first(self.second(x)) + emb + emb)))


class InPlace(nn.Module):
    """Tokens that are changed in place after a norm and after a linear map; two kinds of results in one list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        x = torch.randn(2, 9, 32)
        self.norm = nn.LayerNorm(32)
        self.linear = quantized_layer(nn.Linear(32, 32), QuantLinear, 4, False, "max", x)
        self.conv = quantized_layer(nn.Conv1d(32, 32, 1), QuantConv1d, 4, False, "max", x.transpose(1, 2))

    def forward(self, x):
        h = self.norm(x)
        h[:, 0] = 0
        h.mul_(0.5)
        y = self.linear(h)
        y += 1
        torch.add(y, y, out=y)
        z = self.conv(x.transpose(1, 2))
        return torch.stack([nn.functional.gelu(input=y), z.transpose(1, 2), torch.reshape(input=z, shape=y.shape)])


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "shape"), [(Reshaped, (2, 32, 6, 6)), (Floating, (2, 32, 6, 6)), (InPlace, (2, 9, 32))]
)
def test_what_networks_do_between_the_products(kind, shape):
    network = kind().requires_grad_(False).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(network).double()(x.double())
    found = layers.to_integer(network)(x)
    # in float32 a value may lie on the edge between two integers
    assert golden.relative_error(found.double(), expected) < max(
        1e-6, 2 * golden.relative_error(network(x).double(), expected)
    )


@torch.no_grad()
def test_half_networks_compute_in_half_precision():
    network = Reshaped().requires_grad_(False).eval().half()
    found = layers.to_integer(network)(torch.randn(2, 32, 6, 6))
    assert found.dtype == torch.float16


def test_fractional_zero_points_of_weights_have_no_integer_form():
    layer = Reshaped().second
    layer.weight_quantizer.zero_point += 0.5
    assert layers.find_obstacle(layer) == "fractional zero points of the weight"
