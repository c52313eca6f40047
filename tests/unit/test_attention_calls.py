"""Attention matmuls that are function calls: how they are found, computed, copied, stored and run on integers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qdiff
from qdiff import attention
from qdiff.architecture import Architecture, AttentionMatMulSpec
from qdiff.attention import rewrite
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.ranges import init_activation_ranges
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.cpu import CpuProxy, find_obstacles, to_integer
from qdiff.engines.onnx import export_onnx, exportable
from qdiff.errors import CheckpointError
from qdiff.layers import QuantMatMul
from qdiff.model import enable_activations, init_weights, quantize_model
from qdiff.structure import describe, find_structure
from tests.support.attentions import (
    AttentionBlock,
    BmmAttention,
    EinsumAttention,
    ExplicitAttention,
    FusedAttention,
    GuidedUNet,
)
from tests.support.engines import right, skip_numbers
from tests.support.foreign import QUICK
from tests.support.golden import relative_error

W8A8 = QuantConfig(8, quant_act=True, split=True)
UNET_INPUTS = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8.0) * 100)
TOKENS = torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(2))
SPECS = {
    "qk": AttentionMatMulSpec(("q", "k")),
    "wv": AttentionMatMulSpec(("w", "v"), softmax="w", always_zero=True, follows_a_sym=False),
}


def made(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).eval()


def structure_of(model, *inputs):
    return find_structure(model, lambda: model(*(part[:2] for part in inputs)))


def quantized(model, *inputs, quant=W8A8, **options):
    """`model` by nearest rounding, with the ranges of `inputs`; what is found is quantized."""
    structure = structure_of(model, *inputs)
    options = {"calls": structure.calls, "split_points": lambda _: structure.splits} | options
    network = quantize_model(model, Architecture("own", lambda _: model, {}, **options), quant)
    init_weights(network, "max")
    init_activation_ranges(network, CalibrationData(inputs), "mse", CalibrationConfig(), torch.device("cpu"))
    return network.requires_grad_(False)


def matmuls_of(network):
    return {path: module for path, module in network.named_modules() if isinstance(module, QuantMatMul)}


# --- what is found ------------------------------------------------------------------------------------


def test_attention_and_shortcuts_of_a_guided_diffusion_network_are_found():
    structure = structure_of(made(GuidedUNet), *UNET_INPUTS)
    assert structure.splits == {
        f"output_blocks.{number}.0.skip_connection": first for number, first in enumerate((16, 16, 8, 8))
    }  # and neither the sine and cosine of the time step nor the normalized concatenation
    owners = ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]
    assert list(structure.calls) == [f"{owner}.attention" for owner in owners]
    for calls in structure.calls.values():
        assert [call.name for call in calls] == ["einsum bct,bcs->bts", "einsum bts,bcs->bct"]
        assert [call.probabilities for call in calls] == [(None,), (0,)]


NEAREST = {"rounding": "nearest", "policy_budget": 0, "smoothing": False, "iters_tune": 0}


def test_one_call_quantizes_it_all(tmp_path):
    network = qdiff.quantize(made(GuidedUNet), UNET_INPUTS, **NEAREST)
    summary = describe(network)
    assert (len(summary.matmuls), len(summary.splits)) == (8, 4)
    assert not summary.kept_layers and not summary.kept_matmuls and not summary.unsplit
    qdiff.save(tmp_path / "unet.safetensors", network)
    loaded = qdiff.load(tmp_path / "unet.safetensors", model=made(GuidedUNet), device="cpu", engine="simulated")
    with torch.no_grad():
        assert torch.equal(loaded(*UNET_INPUTS), network(*UNET_INPUTS))
        assert set(matmuls_of(loaded)) == set(summary.matmuls)
        enable_activations(loaded, False)
        assert not torch.equal(loaded(*UNET_INPUTS), network(*UNET_INPUTS))
    other = made(GuidedUNet)
    other.middle_block[1].attention = None
    with pytest.raises(CheckpointError, match=r"another network .*attention"):
        qdiff.load(tmp_path / "unet.safetensors", model=other, device="cpu")


class Products(nn.Module):
    """Products that are no attention, or that cannot be quantized."""

    def __init__(self):
        super().__init__()
        self.mix, self.layer = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        self.register_buffer("basis", torch.randn(8, 8))

    def forward(self, x, t):
        frequencies = torch.einsum("i,j->ij", t, torch.arange(8.0)) + torch.bmm(t[:, None, None], x[:, :1])[:, 0]
        counts = (x > 0).long() @ (x < 0).long().transpose(1, 2)
        x = self.layer(x) @ self.mix.t() + x @ self.basis + frequencies[:, None] + counts.sum()
        x = torch.einsum("ntc->ntc", x) + torch.einsum("ntc,nsc,nsd->ntd", x, x, x)
        x = x + torch.matmul(x, x[0, 0])[..., None]
        return x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def test_other_products_stay_and_say_why():
    calls = structure_of(made(Products), TOKENS, torch.arange(6.0)).calls[""]
    assert all(not call.probabilities for call in calls)
    assert [call.reason for call in calls] == [
        "",
        "",
        "",
        "a factor is a parameter or buffer",
        "a factor is a parameter or buffer",
        "",
        "not a product of two matrices",
        "not a product of two matrices",
        "as matmuls it gives another result",
    ]


class Twice(nn.Module):
    """One attention that runs twice: on a concatenation, and on half of it with other probabilities."""

    def __init__(self):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 4), EinsumAttention(1), nn.Linear(8, 24)

    def forward(self, x):
        h = self.first(x)
        h = self.last(torch.cat([h, h], dim=-1)).transpose(1, 2)
        return self.attention(self.attention(h).repeat(1, 3, 1)).transpose(1, 2) + self.last(x)[..., :8]


def test_modules_that_run_twice_have_the_calls_of_both_runs():
    model = made(Twice)
    structure = structure_of(model, TOKENS)
    assert not structure.splits  # the layer also sees an input that is no concatenation
    assert [call.probabilities for call in structure.calls["attention"]] == [(None,), (0,)]
    network = quantized(model, TOKENS)
    assert len(matmuls_of(network)) == 2 and relative_error(network(TOKENS), model(TOKENS)) < 0.05


def test_multihead_attention_stays_whole():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            h = self.layer(x)
            return self.attention(h, h, h)[0]

    model = made(Network)
    structure = structure_of(model, TOKENS)
    assert structure.calls == {} and structure.whole_attentions == ("attention",)
    network = qdiff.quantize(model, (TOKENS,), keep=["attention"], **QUICK)
    assert describe(network).kept_matmuls == {"attention": (2, "computed as a whole")}
    assert type(network.attention) is nn.MultiheadAttention and "forward" not in vars(network.attention)


# --- calls as matmuls ---------------------------------------------------------------------------------

A, B = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
CAUSAL = {"is_causal": True}
CALLS = [
    (torch.matmul, (A, B.transpose(-2, -1)), {}),
    (torch.baddbmm, (torch.full((3, 5, 7), float("nan")), A[0], B[0].mT), {"beta": 0, "alpha": 0.5}),
    (torch.baddbmm, (torch.ones(3, 5, 7), A[0], B[0].mT), {"beta": 2}),
    (torch.einsum, ("nhqc,nhkc->nhqk", A, B), {}),
    (torch.einsum, ("n h q c, n h k c -> n k q h", A, B), {}),
    (torch.einsum, ("...qc,...kc->...qk", A, B), {}),
    (torch.einsum, ("...qc,...kc", A, B), {}),
    (torch.einsum, ("...qc,kc->...kq", A, B[0, 0]), {}),
    (torch.einsum, ("nhqc,nhc->nqh", A, B[:, :, 0]), {}),
    (torch.einsum, ("nhqc,nhqc->nq", A, A), {}),
    (torch.einsum, ("nhqc,nhkc->nhqkc", A, B), {}),
    (torch.einsum, ("nhqc,nhkc->qk", A, B), {}),
    (torch.einsum, ("nhqc,nhkc->nhqk", [A, B]), {}),
    (F.scaled_dot_product_attention, (A, B, B), {}),
    (F.scaled_dot_product_attention, (A, B, B), {"scale": 1.0}),
    (F.scaled_dot_product_attention, (A, A, A), CAUSAL),
    (F.scaled_dot_product_attention, (A, B, B, torch.rand(5, 7) > 0.5), {}),
    (F.scaled_dot_product_attention, (A, B, B, torch.randn(2, 1, 5, 7)), {}),
    (F.scaled_dot_product_attention, (A, B, B, torch.arange(7) > torch.full((2, 1, 5, 1), 9)), {}),
    (F.scaled_dot_product_attention, (A[0], B[0], B[0]), CAUSAL),
    (F.scaled_dot_product_attention, (A.repeat(1, 2, 1, 1), B, B), {"enable_gqa": True}),
]


@pytest.mark.parametrize("slice_bytes", [attention.SLICE_BYTES, 1])
@pytest.mark.parametrize("case", CALLS)
def test_calls_are_computed_by_matmuls(case, slice_bytes, monkeypatch):
    monkeypatch.setattr(attention, "SLICE_BYTES", slice_bytes)
    func, args, kwargs = case
    shapes = []

    def multiply(a, b):
        shapes.append((a.shape, b.shape))
        return torch.matmul(a, b)

    found, expected = rewrite(func, (multiply, multiply), args, kwargs), func(*args, **kwargs)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    assert all(a[-1] == b[-2] for a, b in shapes)
    if func is F.scaled_dot_product_attention:
        slices = len(args[0]) if slice_bytes == 1 else 1
        assert len(shapes) == 2 * slices and all(len(a) == args[0].dim() for a, _ in shapes)


@pytest.mark.parametrize("equation", ["nhqc,nhkc->nhq", "nhqq,nhkq->nhk", "nhqc,nhkd->nhqk", "nhqc->nhq"])
def test_other_einsums_are_refused(equation):
    with pytest.raises(ValueError):
        rewrite(torch.einsum, (torch.matmul,), (equation, *(A, B)[: equation.count(",") + 1]), {})


# --- quantized calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_function_calls_equal_explicit_matmuls_bit_for_bit(symmetric):
    quant = QuantConfig(8, quant_act=True, a_sym=symmetric)
    calls = quantized(made(AttentionBlock, 8), PIXELS, quant=quant)
    explicit = quantized(
        made(AttentionBlock, 8, attention=ExplicitAttention),
        PIXELS,
        quant=quant,
        calls={},
        attention_matmuls={ExplicitAttention: SPECS},
    )
    assert len(matmuls_of(calls)) == len(matmuls_of(explicit)) == 2
    assert torch.equal(calls(PIXELS), explicit(PIXELS))
    state, expected = calls.state_dict(), explicit.state_dict()
    renamed = {name.replace("matmul_0", "qk").replace("matmul_1", "wv"): tensor for name, tensor in state.items()}
    assert set(renamed) == set(expected) and all(torch.equal(renamed[name], expected[name]) for name in expected)
    enable_activations(calls, False)
    assert not torch.equal(calls(PIXELS), explicit(PIXELS))


MASK = torch.rand(10, 10, generator=torch.Generator().manual_seed(0)).tril() > 0.3
FOREIGN = [
    (FusedAttention, {}, (TOKENS,)),
    (FusedAttention, {"causal": True}, (TOKENS,)),
    (FusedAttention, {}, (TOKENS, TOKENS[:, :4])),
    (FusedAttention, {}, (TOKENS, TOKENS, MASK.repeat(6, 1, 1, 1))),
    (BmmAttention, {}, (PIXELS,)),
    (AttentionBlock, {}, (PIXELS,)),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options", "inputs"), FOREIGN)
def test_quantized_attention_is_near_full_precision(kind, options, inputs, monkeypatch):
    model = made(kind, 8, **options)
    network = quantized(model, *inputs)
    first, second = matmuls_of(network).values()
    holders = [quantizer for matmul in (first, second) for quantizer in matmul.act_quantizers if quantizer.is_softmax]
    assert len(holders) == 1 and holders[0] in second.act_quantizers and holders[0].always_zero
    expected = network(*inputs)
    assert 0 < relative_error(expected, model(*inputs)) < 0.05
    monkeypatch.setattr(attention, "SLICE_BYTES", 1)
    assert torch.allclose(network(*inputs), expected, atol=1e-6)
    second.act_quantizers[1 - second.act_quantizers.index(holders[0])].scale.mul_(20)
    assert (network(*inputs) - expected).abs().max() > 0.02  # the matmuls do compute it
    enable_activations(network, False)
    used = []
    monkeypatch.setattr(QuantMatMul, "forward", lambda *_: used.append(1))
    network(*inputs)
    assert not used  # in full precision, PyTorch's own functions are faster


@torch.no_grad()
def test_copies_have_matmuls_of_their_own():
    network = quantized(made(AttentionBlock, 8), PIXELS)
    other, expected = copy.deepcopy(network), network(PIXELS)
    assert torch.equal(other(PIXELS), expected)
    other.attention.matmul_0.act_quantizer_q.scale.mul_(20)
    assert torch.equal(network(PIXELS), expected) and not torch.equal(other(PIXELS), expected)


@torch.no_grad()
def test_integers_and_onnx_compute_function_calls():
    network = quantized(made(GuidedUNet), *UNET_INPUTS)
    integer = to_integer(network)
    found = find_obstacles(integer)
    assert [found[path] for path in found if "matmul" in path] == [None] * 8
    expected = network(*UNET_INPUTS)
    assert relative_error(exportable(network)(*UNET_INPUTS), expected) < 1e-5
    for proxy in integer.modules():
        if isinstance(proxy, CpuProxy) and isinstance(proxy.simulated, QuantMatMul):
            proxy.simulated.forward = None  # nothing is simulated
    found = integer(*UNET_INPUTS)
    if right(network):
        assert relative_error(found, expected) < 0.03
    skip_numbers(right(network))


@torch.no_grad()
def test_timestep_groups_are_those_of_the_samples():
    network = quantized(made(GuidedUNet), *UNET_INPUTS, quant=QuantConfig(8, quant_act=True, time_bounds=(350.0,)))
    whole = network(*UNET_INPUTS)
    halves = [network(*(part[rows] for part in UNET_INPUTS)) for rows in (slice(0, 4), slice(4, 8))]
    assert relative_error(torch.cat(halves), whole) < 0.01


def test_layers_of_pytorchs_encoder_layer_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    network = qdiff.quantize(model, (TOKENS,), keep=["1.self_attn"], **QUICK)
    assert describe(network).kept_matmuls == {"1.self_attn": (2, "computed as a whole")}
    runs = []
    network[1].linear1.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        assert relative_error(network(TOKENS), model(TOKENS)) < 0.05 and runs


@torch.no_grad()
@pytest.mark.parametrize(("kind", "inputs"), [(FusedAttention, TOKENS), (BmmAttention, PIXELS)])
def test_function_calls_are_exported(kind, inputs, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network = quantized(made(kind, 8), inputs)
    export_onnx(tmp_path / "network.onnx", network, (inputs,))
    session = runtime.InferenceSession(str(tmp_path / "network.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    difference = (torch.from_numpy(found) - network(inputs)).abs()
    assert difference.median() < 1e-6 and difference.max() < 0.02  # some values lie on the edge between two integers
    operators = [node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node]
    assert operators.count("QuantizeLinear") == 8  # the inputs of 4 layers and of 2 matmuls


class Outer(nn.Module):
    """A module that attends by itself and has another attention inside; `changes` says what it does differently."""

    def __init__(self, inner, changes=None):
        super().__init__()
        self.first, self.inner, self.changes = nn.Linear(8, 8), inner, changes

    def forward(self, x):
        weights = torch.softmax(x @ self.first(x).mT, dim=-1) if self.changes != "no attention" else x
        h = self.inner(x) if self.changes != "inner first" else x
        if self.changes == "sum":
            return torch.einsum("nts,nsc->nc", weights, h)
        return h if self.changes in ("none", "no attention") else weights @ h


@torch.no_grad()
def test_attention_inside_attention_keeps_its_own_calls():
    model = made(Outer, made(Outer, made(FusedAttention, 8)))
    network = quantized(model, TOKENS)
    assert len(matmuls_of(network)) == 6 and relative_error(network(TOKENS), model(TOKENS)) < 0.05
    inner = quantized(model, TOKENS, keep=("inner.inner", "matmul_0", "matmul_1"))
    assert list(matmuls_of(inner)) == ["inner.matmul_0", "inner.matmul_1"]
    outer = quantized(model, TOKENS, keep=("inner",))
    assert list(matmuls_of(outer)) == ["matmul_0", "matmul_1"]
    assert relative_error(outer(TOKENS), model(TOKENS)) < 0.05 and relative_error(inner(TOKENS), model(TOKENS)) < 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("sum", "inner: calls einsum nts,nsc->nc, expected matmul as in the forward pass that was traced"),
        ("none", "inner: made 1 calls that multiply activations, expected matmul, matmul"),
    ],
)
def test_other_calls_than_the_traced_ones_are_refused(changes, message):
    network = quantized(nn.Sequential(nn.Linear(8, 8)), TOKENS)
    model = made(Outer, made(Outer, nn.Linear(8, 8)))
    network = quantized(model, TOKENS)
    network.inner.changes = changes
    with pytest.raises(RuntimeError, match=message):
        network(TOKENS)
    network.inner.changes = "no attention"
    network(TOKENS)
    network.inner.changes = None
    assert relative_error(network(TOKENS), model(TOKENS)) < 0.05  # the error leaves no traces
