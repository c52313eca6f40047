"""Engines and the formats of single layers: widths of a policy, inputs of 9 to 16 bits, smoothing, kept layers."""

import copy
import logging
import statistics
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.engines import cpu, cpu_kernels, operands, select, speed
from qdiff.engines.cpu import to_integer
from qdiff.engines.cuda import PackedLayer, to_packed
from qdiff.engines.deferred import Epilogue, deferred
from qdiff.engines.select import apply_engine
from qdiff.errors import ConfigError
from qdiff.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear
from qdiff.model import enable_activations, quant_layers, set_mode_parameters
from tests.support import golden
from tests.support.engines import (
    attention_matmul,
    check,
    factors,
    network_of_policy,
    on_grid,
    quantized_layer,
    right,
    skip_numbers,
)

pytestmark = pytest.mark.usefixtures("integer_path")

LAYERS = [  # full-precision type, its arguments, quantized form, shape of the input, split
    (nn.Conv2d, (12, 20, 3, 1, 1), QuantConv2d, (2, 12, 9, 7), 0),
    (nn.Conv2d, (12, 48, 3, 2, 1), QuantConv2d, (2, 12, 9, 7), 5),
    (nn.Conv2d, (12, 20, 1), QuantConv2d, (2, 12, 9, 7), 0),
    (nn.Conv2d, (12, 20, 1), QuantConv2d, (2, 12, 9, 7), 5),
    (nn.Linear, (24, 17), QuantLinear, (3, 5, 24), 0),
    (nn.Conv1d, (5, 9, 1), QuantConv1d, (3, 5, 24), 0),
]


def layers(bits: int, act_bit: int, symmetric: bool, smoothed: bool):
    """Quantized layers of every kind, with an input on the grid of each."""
    for float_type, arguments, kind, shape, split in LAYERS:
        torch.manual_seed(bits + act_bit)
        x = torch.randn(shape) * 3 + 0.5
        smoothing = factors(shape[kind.channels]) if smoothed else None
        layer = quantized_layer(float_type(*arguments), kind, bits, symmetric, "max", x, split, act_bit, smoothing)
        yield layer, on_grid(layer, x)


@torch.no_grad()
@pytest.mark.parametrize("act_bit", [4, 8, 9, 12, 16])
def test_every_width_is_exact_with_and_without_smoothing(operators, act_bit):
    compared = []
    for bits, symmetric, smoothed in product([2, 4, 8], [True, False], [True, False]):
        for layer, x in layers(bits, act_bit, symmetric, smoothed):
            assert cpu.integer_form(layer).obstacle is None
            compared.append(check(layer, x))
    assert sum(compared) >= len(compared) * 2 // 3  # 2 and 4 bits are exact on every processor
    skip_numbers(all(compared))


@torch.no_grad()
@pytest.mark.parametrize("act_bit", [6, 8, 13, 16])
def test_integers_are_those_of_the_simulation(act_bit):
    """Float32 divides by the factor, then by the scale, in both; without an epilogue nothing rounds differently."""
    for symmetric, split in product([True, False], [0, 5]):
        torch.manual_seed(act_bit)
        x = torch.randn(2, 12, 40, 30)
        conv = nn.Conv2d(12, 8, 3)
        layer = quantized_layer(conv, QuantConv2d, 4, symmetric, "max", x * 0.7, split, act_bit, factors(12))
        form = cpu.IntegerConv2d(layer)
        halves = layer._parts(x), form.inputs, layer._parts(layer.quantize_input(x))
        for part, grid, expected in zip(*halves, strict=True):
            rows = deferred(part).rows
            found = grid.quantize(rows, Epilogue())
            integers = sum((term.q.int() - term.zero) * round(term.scale / found.scale) for term in found.terms())
            steps = (expected.double() / grid.quantizer.scale.double()).round().permute(0, 2, 3, 1)
            assert torch.equal(integers.double().view_as(steps), steps)
            assert integers.abs().max() > 2 ** (act_bit - 2)
            assert torch.equal(found.centered(), integers.sum(2, dtype=torch.int32))


@torch.no_grad()
def test_bfloat16_rounds_the_sum_of_both_products_once():
    compared = []
    for bits in (4, 8):
        for layer, x in layers(bits, 16, False, False):
            exact = copy.deepcopy(layer).double()(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                found = cpu.integer_form(layer)(x) + 0
            compared.append(right(layer))
            if compared[-1]:
                once = golden.relative_error(exact.bfloat16(), exact)
                halves = 1.8 if layer.split else 1.05  # halves are rounded apart, and their sum again
                assert golden.relative_error(found, exact) < halves * once
    skip_numbers(all(compared))


@torch.no_grad()
def test_zero_points_of_two_bytes_may_lie_outside_their_range(operators):
    torch.manual_seed(0)
    x = (torch.randint(0, 2**16, (2, 12, 5, 5)) + 100_000) / 64
    layer = quantized_layer(nn.Conv2d(12, 8, 3, padding=1), QuantConv2d, 4, False, "max", x, act_bit=16)
    for zero in (-100_000.0, 70_000.0, 3.0):
        layer.act_quantizer.set_qparams(torch.tensor(1 / 64), torch.tensor(zero))
        inputs = (torch.randint(0, 2**16, x.shape) - zero) / 64
        assert cpu.integer_form(layer).obstacle is None
        check(layer, inputs)


def wide_layer(act_bit: int = 16, bits: int = 4) -> QuantLayer:
    torch.manual_seed(0)
    return quantized_layer(nn.Linear(64, 8), QuantLinear, bits, False, "max", torch.randn(6, 64), act_bit=act_bit)


@torch.no_grad()
def test_what_two_bytes_cannot_hold_exactly_is_simulated():
    x = torch.randn(6, 64)
    far, between, weight = wide_layer(), wide_layer(), wide_layer(bits=9)
    far.act_quantizer.zero_point.fill_(2.0**24)
    between.act_quantizer.zero_point.fill_(0.5)
    long = quantized_layer(nn.Linear(40_000, 1), QuantLinear, 4, False, "max", torch.randn(2, 40_000), act_bit=16)
    for layer, obstacle, inputs in (
        (far, "sums beyond 32 bits", x),
        (between, "fractional zero points", x),
        (weight, "weights of more than 8 bits", x),
        (long, "sums beyond 32 bits", torch.randn(2, 40_000)),
    ):
        form = cpu.integer_form(layer)
        assert form.obstacle == obstacle
        assert torch.equal(form(inputs), layer(inputs))
    assert cpu.integer_form(attention_matmul(False, 16)).obstacle == "operands of more than 8 bits"


POLICY = (
    ("conv_in", "W8A16"),
    ("conv_out", "keep"),
    ("down.*.conv1", "W6A12"),
    ("down.1.block.0.conv2", "W16"),
    ("up.0.block.0.conv1", "A16"),
    ("mid.block_2.conv1", "keep"),
    ("mid.attn_1.q", "keep"),
    ("*.temb_proj", "A9"),
)


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_networks_with_a_policy_are_as_near_to_float64_as_float32_is(symmetric):
    """Over 8 inputs the median error of the integer network is at most 1.5 times that of the float32 simulation."""
    simulated, rows, _ = network_of_policy(POLICY, a_sym=symmetric)
    integer, exact = to_integer(simulated), copy.deepcopy(simulated).double()
    assert type(integer.conv_out) is type(integer.mid.attn_1.q) is nn.Conv2d
    errors = {"integer": [], "simulated": []}
    for i in range(8):
        inputs = tuple(part[i : i + 1] for part in rows.inputs)
        reference = exact(*(part.double() for part in inputs))
        errors["integer"].append(golden.relative_error(integer(*inputs), reference))
        errors["simulated"].append(golden.relative_error(simulated(*inputs), reference))
    skip_numbers(right(simulated))
    assert statistics.median(errors["integer"]) <= 1.5 * statistics.median(errors["simulated"])


@torch.no_grad()
def test_timestep_groups_of_two_bytes():
    simulated, rows, _ = network_of_policy(POLICY, grouped=True)
    integer, exact = to_integer(simulated), copy.deepcopy(simulated).double()
    for chosen in (slice(0, 2), slice(48, 50), slice(0, None, 9)):  # one time step, another, several
        inputs = tuple(part[chosen] for part in rows.inputs)
        found, expected = integer(*inputs), exact(*(part.double() for part in inputs))
        if right(simulated):
            assert golden.relative_error(found, expected) < 0.05
    skip_numbers(right(simulated))


class Kept(nn.Module):
    """Layers in full precision among integer layers, with norms, activations and views between them."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 8).requires_grad_(False)
        self.first = quantized_layer(nn.Conv2d(8, 8, 3, padding=1), QuantConv2d, 4, False, "max", x)
        self.last = quantized_layer(nn.Conv2d(16, 8, 1), QuantConv2d, 4, False, "max", torch.cat([x, x], 1), 8)
        self.kept = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.token = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(F.silu(self.norm(x)))
        kept = self.kept(F.silu(self.norm(h)))
        heads = kept.view(4, 4, 36).transpose(1, 2).reshape(2, 2, 36, 4).transpose(1, 2).reshape(2, 36, 8)
        tokens = self.token(heads).transpose(1, 2).view(2, 8, 6, 6)
        return self.last(torch.cat([F.silu(self.norm(kept)), self.first(tokens)], 1)) + kept


@torch.no_grad()
def test_deferred_work_passes_through_kept_layers(operators):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    network = Kept(x)
    integer = to_integer(network)
    assert golden.relative_error(integer(x), network(x)) < 0.02  # some values lie on the edge between two integers
    with torch.autocast("cpu", torch.bfloat16):
        assert golden.relative_error(integer(x).float(), network(x)) < 0.05


@torch.no_grad()
def test_modes_can_change_on_an_engine():
    """Without quantized activations an integer network is the simulation, with the parameters of that mode."""
    simulated, rows, _ = network_of_policy(POLICY)
    inputs = tuple(part[:2] for part in rows.inputs)
    others = {"conv_in.bias": torch.ones(16), "mid.block_1.norm1.weight": torch.full((32,), 2.0)}
    set_mode_parameters(simulated, others)
    for prepared in (to_integer(simulated), copy.deepcopy(to_integer(simulated)), to_packed(simulated)):
        before = prepared(*inputs)
        reference = copy.deepcopy(simulated)
        for model in (prepared, reference):
            enable_activations(model, False)
        assert golden.relative_error(prepared(*inputs), reference(*inputs)) < 1e-5
        enable_activations(prepared, True)
        assert torch.equal(prepared(*inputs), before)


def test_the_log_names_what_stays_simulated(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    simulated, *_ = network_of_policy(POLICY, sm_abit=16)
    apply_engine(simulated, "integer")
    assert caplog.messages == [
        f"engine: integer (51 of 56 layers and attention matmuls) for {speed.origin()}; "
        "simulated: down.1.block.0.conv2 (weights of more than 8 bits); "
        "simulated: down.1.attn.0.av, mid.attn_1.av, up.1.attn.0.av, up.1.attn.1.av (operands of more than 8 bits)"
    ]
    monkeypatch.setattr(select, "MAX_NAMES", 2)
    caplog.clear()
    apply_engine(network_of_policy((("down.*", "W12"),))[0], "integer")
    assert "down.0.block.0.conv1, down.0.block.0.temb_proj and 10 more (weights of more than 8 bits)" in caplog.text
    with pytest.raises(ConfigError, match=r"no layer has a form .*\(weights of more than 8 bits\)"):
        apply_engine(network_of_policy((("*", "W12A16"),))[0], "integer")


def test_auto_counts_the_products_of_layers_that_can_run_on_integers(monkeypatch):
    simulated, *_ = network_of_policy(())
    sizes = [layer.shape.numel() for layer in quant_layers(simulated).values()]
    mean = sum(sizes) // len(sizes)
    monkeypatch.setattr(speed, "MIN_WEIGHTS", mean)
    assert apply_engine(simulated) is not simulated
    twice, *_ = network_of_policy((("*", "A16"),))  # each product is done twice
    assert apply_engine(twice) is twice
    monkeypatch.setattr(speed, "MIN_WEIGHTS", mean // 2)
    assert apply_engine(twice) is not twice
    few, *_ = network_of_policy((("*", "W12"), ("conv_in", "W4")))  # the one layer on integers is small
    assert apply_engine(few) is few


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layers_are_smoothed(bits):
    torch.manual_seed(0)
    x = torch.randn(40, 16) * 3
    layer = quantized_layer(nn.Linear(16, 24), QuantLinear, bits, False, "max", x, smoothing=factors(16))
    x = on_grid(layer, x)
    assert torch.equal(PackedLayer(copy.deepcopy(layer))(x), layer(x))


@torch.no_grad()
def test_packed_networks_honor_policies():
    simulated, rows, _ = network_of_policy((("*.temb_proj", "A16"), ("conv_in", "W8A16"), ("conv_out", "keep")))
    inputs = tuple(part[:4] for part in rows.inputs)
    assert torch.equal(to_packed(simulated)(*inputs), simulated(*inputs))


@torch.no_grad()
def test_16_bits_fill_both_bytes(operators):
    x = torch.arange(2.0**16).view(1, 2**15, 2) - 30_000
    quantizer = wide_layer().act_quantizer
    quantizer.set_qparams(torch.tensor(1.0), torch.tensor(30_000.0))
    found = operands.InputGrid(quantizer).quantize(cpu_kernels.ChannelsLastView(x, 1, 2**15, 2, 2), Epilogue())
    low, high = (byte.flatten().int() for byte in found.bytes)
    assert torch.equal(256 * high + low, torch.arange(2**16, dtype=torch.int32))
    assert [term.scale * (term.q.double() - term.zero).sum().item() for term in found.terms()] == [
        (256 * (high.double() - 117)).sum().item(),
        (low.double() - 48).sum().item(),
    ]
