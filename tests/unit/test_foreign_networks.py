"""The engines and networks that do not know them: shared layers, attributes, hooks, views, memory, unusual shapes."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdiff
from qdiff.engines import cpu, cpu_kernels
from qdiff.engines.cpu import to_integer
from qdiff.engines.cuda import PackedLayer, to_packed
from qdiff.engines.onnx import exportable
from qdiff.engines.select import apply_engine
from qdiff.errors import ConfigError
from qdiff.layers import QuantConv1d, QuantConv2d, QuantLinear
from qdiff.scale_rules import choose_qparams
from tests.support import golden
from tests.support.engines import attention_matmul, check, quantized_layer, right, skip_numbers
from tests.support.foreign import INPUTS, QUICK, Denoiser, Residual

pytestmark = pytest.mark.usefixtures("integer_path")
X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def convolution(x: Tensor = X, **changes) -> QuantConv2d:
    torch.manual_seed(0)
    geometry = {"kernel_size": 3, "padding": 1, "out_channels": 8} | changes
    return quantized_layer(nn.Conv2d(x.shape[1], **geometry), QuantConv2d, 4, False, "max", x)


class Single(tuple):
    def __new__(cls, sample: Tensor):
        return super().__new__(cls, (sample.contiguous(),))


class Network(nn.Module):
    """GroupNorm and a quantized convolution; `body` says how they are used."""

    def __init__(self, body) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 8).requires_grad_(False), convolution()
        self.body = body

    def forward(self, x: Tensor):
        return self.body(self, x)


def near(found: Tensor, network: nn.Module, x: Tensor = X) -> bool:
    return golden.relative_error(found, network(x)) < 0.02  # some values lie on the edge between two integers


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "geometry", "size"),
    [
        ((4, 192), {"kernel_size": 3, "padding": 1, "groups": 4}, (8, 8)),
        ((16, 32), {"kernel_size": (1, 3), "stride": (1, 2), "groups": 16}, (8, 3)),
        ((64, 64), {"kernel_size": (1, 5), "padding": (2, 0), "groups": 64}, (8, 5)),
        ((1, 16), {"kernel_size": 5, "stride": (1, 2), "padding": 2}, (8, 1)),
        ((16, 48), {"kernel_size": 1, "stride": 2, "padding": 1, "dilation": (1, 3)}, (8, 1)),
        ((16, 48), {"kernel_size": (3, 1), "padding": (1, 0), "dilation": (1, 2)}, (8, 6)),
    ],
)
def test_convolutions_that_onednn_gets_wrong(channels, geometry, size):
    torch.manual_seed(0)
    x = torch.randn(2, channels[0], *size)
    check(quantized_layer(nn.Conv2d(*channels, **geometry), QuantConv2d, 4, True, "max", x), x)


SHAPES = [  # of both operands, and whether they run on integers
    ((4, 19, 13), (4, 13, 8), True),
    ((2, 3, 19, 13), (2, 3, 13, 8), True),
    ((4, 19, 1), (4, 1, 8), False),  # one token of context
    ((4, 1, 13), (4, 13, 1), True),
    ((4, 5, 6), (1, 6, 7), False),
    ((4, 5, 6), (6, 7), False),
    ((4, 5, 6), (2, 4, 6, 7), False),
]


@torch.no_grad()
def test_attention_matmuls_of_every_shape_are_exact(operators):
    for first, second, integer in SHAPES:
        torch.manual_seed(0)
        matmul = attention_matmul(False, 8)
        a, b = torch.rand(first), torch.randn(second)
        for quantizer, x in zip(matmul.act_quantizers, (a, b), strict=True):
            quantizer.set_qparams(
                *choose_qparams(x, 8, symmetric=quantizer.symmetric, always_zero=quantizer.always_zero)
            )
            quantizer.enabled = True
            x.copy_(quantizer(x))  # so that no value lies on the edge between two integers
        form = cpu.integer_form(matmul)
        calls = []
        form.simulated.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found = form(a, b)
        assert bool(calls) != integer
        expected = copy.deepcopy(matmul).double()(a.double(), b.double())
        assert found.shape == expected.shape
        if right(matmul) or not integer:
            assert golden.relative_error(found.double(), expected) < 1e-6
    skip_numbers(right(matmul))


@torch.no_grad()
def test_attention_matmuls_that_are_not_quantized_stay():
    matmul = attention_matmul(False, 8)
    a, b = torch.rand(2, 5, 6), torch.randn(2, 6, 7)
    assert torch.equal(cpu.IntegerMatMul(matmul)(a, b), a @ b)


@torch.no_grad()
@pytest.mark.parametrize("layer", [convolution(), quantized_layer(nn.Linear(6, 5), QuantLinear, 4, False, "max", X)])
def test_fractional_zero_points_are_simulated_and_no_onnx(layer):
    layer = copy.deepcopy(layer)
    layer.act_quantizer.zero_point += 0.5
    check(layer, X)
    assert cpu.integer_form(layer).obstacle == "fractional zero points"
    with pytest.raises(ConfigError, match=r"zero point of .*\.5: ONNX has whole ones"):
        exportable(nn.Sequential(layer))


@torch.no_grad()
def test_a_layer_at_two_paths_is_replaced_at_both():
    network = nn.Sequential(convolution(), nn.Identity())
    network[1] = network[0]
    expected = network(X)
    for changed, kind in ((to_integer(network), cpu.IntegerConv2d), (to_packed(network), PackedLayer)):
        assert isinstance(changed[0], kind) and changed[1] is changed[0]
        assert golden.relative_error(changed(X), expected) < 0.02
    exported = exportable(network)
    assert not any(isinstance(module, QuantConv2d) for module in exported.children()) and exported[1] is exported[0]


def test_a_network_quantized_from_python_runs_on_integers():
    model = Denoiser()
    quantized = qdiff.quantize(model, INPUTS, weight_bit=8, blocks=[Residual], timestep_groups=2, **QUICK)
    integer = apply_engine(quantized, "integer")
    with torch.no_grad():
        for rows in (slice(0, 1), slice(11, 12), slice(None)):  # of each timestep group, of both
            inputs = tuple(tensor[rows] for tensor in INPUTS)
            found, expected = integer(*inputs), quantized(*inputs)
            assert found.shape == expected.shape and torch.isfinite(found).all()
            if right(quantized):
                assert golden.relative_error(found, expected) < 0.02
    skip_numbers(right(quantized))


@torch.no_grad()
def test_what_networks_read_of_their_layers_stays():
    def body(network, x):
        assert network.norm.num_groups == 4 and network.conv.in_channels == 8 and network.conv.bias.shape == (8,)
        assert network.conv.stride == network.conv.padding == network.conv.dilation == (1, 1)
        return network.conv(network.norm(x)).to(network.conv.weight.dtype)

    network = Network(body)
    found = to_integer(network)(X)
    assert near(found, network) and near(to_packed(network)(X), network)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = to_integer(network).conv.nothing_of_that_name


@torch.no_grad()
def test_hooks_stay():
    network = Network(lambda network, x: network.conv(network.norm(x)))
    network.norm.register_forward_hook(lambda _, inputs, output: output + 1)
    network.conv.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    assert near(to_integer(network)(X), network) and near(to_packed(network)(X), network)


@torch.no_grad()
def test_results_of_convolutions_can_be_viewed(operators):
    calls = [
        lambda y: y.view(4, 4, 36),
        lambda y: y.view(2, 8, 36).view(4, 4, 36).view((16, 36)),
        lambda y: y.view_as(torch.empty(16, 36)),
        lambda y: y.view(dtype=torch.int32).view(torch.float32),
        lambda y: y.reshape(4, 4, -1),
        lambda y: y.flatten(1),
    ]
    for call in calls:
        network = Network(lambda network, x, call=call: call(network.conv(network.norm(x))))
        assert near(to_integer(network)(X), network)


@torch.no_grad()
def test_results_are_ordinary_tensors_in_contiguous_memory(operators):
    result = namedtuple("result", "sample rest")
    forms = [
        (lambda y: y, lambda y: y),
        (lambda y: {"sample": y, "rest": [y, 3]}, lambda y: y["rest"][0]),
        (lambda y: result(y, None), lambda y: y.sample),
        (lambda y: [y, (y,)], lambda y: y[1][0]),
        (lambda y: Single(y + 0), lambda y: y[0]),
    ]
    for make, take in forms:
        network = Network(lambda network, x, make=make: make(network.conv(x)))
        found = to_integer(network)(X)
        assert type(found) is type(network(X))
        found = take(found)
        assert type(found) is Tensor and found.is_contiguous() and golden.relative_error(found, take(network(X))) < 1e-6


@torch.no_grad()
def test_an_input_changed_in_place_after_its_norm_is_noticed(operators):
    def body(network, x):
        h = network.norm(x)
        x += 1
        return network.conv(F.silu(h)) + x

    wide = X.contiguous(memory_format=torch.channels_last)
    network = Network(body)
    with pytest.raises(RuntimeError, match="changed in place between its GroupNorm"):
        to_integer(network)(wide.clone())
    expected = network(wide.clone())
    assert golden.relative_error(to_integer(network)(X.clone()), expected) < 0.02  # was copied
    with torch.inference_mode():  # knows no changes: is copied
        assert golden.relative_error(to_integer(network)(wide.clone()), expected) < 0.02


@torch.no_grad()
def test_other_changes_in_place_are_followed(operators):
    def half(network, x):
        first, second = x.chunk(2)
        h = network.norm(first)
        second += 1  # another part of the same memory
        return network.conv(F.silu(h)) + second

    def shift(network, x):
        t = torch.ones(2, 8, 1, 1)
        h = network.conv(x) + t
        t.mul_(5)
        return network.conv(h)

    def later(network, x):
        h = network.conv(network.norm(x))
        x += 1
        return h + x

    for body, x in ((half, torch.cat([X, X])), (shift, X), (later, X)):
        x = x.contiguous(memory_format=torch.channels_last)
        network = Network(body)
        assert golden.relative_error(to_integer(network)(x.clone()), network(x.clone())) < 0.02


@torch.no_grad()
def test_wrong_numbers_of_channels_are_the_layers_own_errors():
    with pytest.raises(RuntimeError, match=r"expected input.* to have 8 channels, but got 6"):
        cpu.IntegerConv2d(convolution())(X[:, :6])
    linear = quantized_layer(nn.Linear(6, 5), QuantLinear, 4, False, "max", X)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.IntegerLinear(linear)(X[..., :4])
    conv1d = quantized_layer(nn.Conv1d(8, 5, 1), QuantConv1d, 4, False, "max", X[..., 0])
    with pytest.raises(RuntimeError, match="8 channels, but got 6"):
        cpu.IntegerConv1d(conv1d)(X[:, :6, :, 0])
    network = to_integer(Network(lambda network, x: network.norm(x)))
    with pytest.raises(RuntimeError, match="weight"):
        network(torch.randn(2, 16, 6, 6))


def test_engines_that_cannot_be_are_named():
    network = Network(lambda network, x: network.conv(x))
    with pytest.raises(
        ConfigError, match=r"^engine integers: expected one of auto, integer, integer_packed, simulated"
    ):
        apply_engine(network, "integers")
    depthwise = nn.Sequential(convolution(groups=8))
    with pytest.raises(ConfigError, match="no layer has a form"):
        apply_engine(depthwise, "integer")


def test_one_layer_without_an_integer_form_stays_beside_the_others():
    network = apply_engine(nn.Sequential(convolution(), convolution(groups=8)), "integer")
    assert [layer.obstacle for layer in network] == [None, "one input channel in a group"]


@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits():
    if cpu_kernels.library() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    rows = cpu_kernels.ChannelsLastView(torch.randn(3, 700, 12), 3, 700, 12, 12)
    a, b = torch.rand(3, 12), torch.randn(3, 12)
    grid = cpu_kernels.IntegerGrid(0.05, -128, 127, 128, torch.rand(12) + 0.5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                [
                    *rows.stats(None, 4, 1e-5),
                    rows.values((a, b), True),
                    *rows.quantize((a, b), True, grid)[0],
                    rows.quantize((a, b), True, grid)[1],
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_a_compiler_with_options_is_used(monkeypatch, tmp_path):
    compiler = cpu_kernels.shutil.which("g++") or cpu_kernels.shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_kernels.library.__wrapped__() is not None and list(tmp_path.glob("qdiff/kernels-*.so"))
