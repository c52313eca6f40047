"""The integer engine: exact products, the same network, and a fallback where it would be wrong."""

import copy
import logging
import pickle
import statistics
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from ddim.family import PIXEL
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig
from qdiff.engines import cpu, cpu_kernels, probe, speed
from qdiff.engines.cpu import to_integer
from qdiff.engines.deferred import DeferredTensor
from qdiff.engines.select import apply_engine
from qdiff.errors import ConfigError
from qdiff.layers import ActQuantizer, QuantConv1d, QuantConv2d, QuantLinear, QuantMatMul
from qdiff.scale_rules import choose_qparams
from tests.support import golden, tiny
from tests.support.engines import (
    LINEAR,
    attention_matmul,
    check,
    network_of,
    quantized_layer,
    right,
    skip_numbers,
)

pytestmark = pytest.mark.usefixtures("integer_path")


GEOMETRIES = [  # channels, geometry, split, whether the input is positive
    ((12, 20), {"kernel_size": 3, "padding": 1}, 0, False),
    ((12, 20), {"kernel_size": 3, "padding": 1}, 0, True),
    ((12, 20), {"kernel_size": 3, "stride": 2}, 0, False),
    ((12, 20), {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False}, 0, False),
    ((12, 24), {"kernel_size": 3, "padding": 1, "groups": 4}, 0, False),
    ((12, 20), {"kernel_size": 1}, 5, False),
    ((12, 20), {"kernel_size": 1}, 0, True),
    ((12, 20), {"kernel_size": 1, "stride": 2}, 0, False),
    ((12, 20), {"kernel_size": 1, "bias": False}, 0, False),
    ((12, 48), {"kernel_size": 3, "padding": 1}, 0, False),
    ((12, 96), {"kernel_size": 3, "padding": 1, "bias": False}, 5, False),
    ((3, 16), {"kernel_size": 3, "padding": 1}, 0, False),
    ((16, 3), {"kernel_size": 3, "padding": 1}, 0, True),
    ((12, 20), {"kernel_size": 3, "padding": "same", "dilation": 2}, 0, False),
    ((12, 20), {"kernel_size": (4, 3), "padding": "same"}, 0, False),
    ((12, 20), {"kernel_size": 3, "padding": "valid"}, 0, False),
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_convolution_is_exact(operators):
    compared = []
    for bits, (symmetric, method), case in product([2, 4, 8], [(True, "mse"), (False, "max")], GEOMETRIES):
        channels, geometry, split, positive = case
        torch.manual_seed(bits)
        x = torch.randn(2, channels[0], 9, 7) * 3 + (4 if positive else 0.5)
        x = x.abs() if positive else x
        layer = nn.Conv2d(*channels, **geometry)
        layer.weight.data += torch.randn(channels[1], 1, 1, 1) * 0.2  # weights of one sign too: zero points far out
        compared.append(check(quantized_layer(layer, QuantConv2d, bits, symmetric, method, x, split), x))
    assert sum(compared) >= len(compared) * 2 // 3  # 2 and 4 bits are exact on every processor
    skip_numbers(all(compared))


@torch.no_grad()
@pytest.mark.parametrize("positive", [False, True])
def test_a_weight_prepacked_for_one_shape_is_right_for_others(positive):
    """oneDNN's best form of a weight depends on the shape of the input, and on whether there is a zero point."""
    torch.manual_seed(0)
    x = torch.randn(8, 64, 16, 16)
    x = x.abs() if positive else x  # a zero point of 0
    layer = quantized_layer(nn.Conv2d(64, 96, 3, padding=1), QuantConv2d, 4, False, "max", x)
    proxy, exact = cpu.integer_form(layer), copy.deepcopy(layer).double()
    x = layer.act_quantizer(x)  # so that no value lies on the edge between two integers
    for part in (x, x[:1], x[:2, :, :5, :3], x):
        assert golden.relative_error((proxy(part) + 0).double(), exact(part.double())) < 1e-6


@torch.no_grad()
def test_every_linear_layer_is_exact(operators):
    compared = []
    for bits, symmetric in product([4, 8], [True, False]):
        torch.manual_seed(bits)
        x = torch.randn(3, 5, 24)
        layer = nn.Linear(24, 17)
        layer.weight.data += torch.randn(17, 1) * 0.2
        compared.append(check(quantized_layer(layer, QuantLinear, bits, symmetric, "mse", x), x))
        compared.append(check(quantized_layer(nn.Conv1d(5, 9, 1), QuantConv1d, bits, symmetric, "mse", x), x))
    skip_numbers(all(compared))


@torch.no_grad()
def test_wide_linear_layers_keep_what_weight_zero_points_leave():
    compared = []
    for outlier, tolerance in ((False, 1e-6), (True, 3e-6)):
        torch.manual_seed(0)
        x = nn.functional.silu(torch.randn(16, 5120))
        layer = nn.Linear(5120, 64)
        if outlier:
            layer.weight.data[:, 0] = 3 * layer.weight.abs().amax(1).data
        layer = quantized_layer(layer, QuantLinear, 8, False, "max", x)
        inputs = layer.act_quantizer(x)  # so that no value lies on the edge between two integers
        compared.append(check(layer, inputs, tolerance=tolerance))
    skip_numbers(all(compared))


@torch.no_grad()
def test_every_attention_matmul_is_exact(operators):
    compared = []
    for symmetric, sm_abit in product([True, False], [8, 16]):
        torch.manual_seed(0)
        attention = attention_matmul(symmetric, sm_abit)
        assert isinstance(attention, QuantMatMul)
        operands = [torch.softmax(torch.randn(4, 19, 13) * 4, 2), torch.randn(4, 13, 8)]
        for quantizer, x in zip(attention.act_quantizers, operands, strict=True):
            quantizer.set_qparams(
                *choose_qparams(x, quantizer.n_bits, symmetric=quantizer.symmetric, always_zero=quantizer.always_zero)
            )
            quantizer.enabled = True
            x.copy_(quantizer(x))  # so that no value lies on the edge between two integers
        compared.append(check(attention, *operands))
    skip_numbers(all(compared))


KINDS = ("pixel", "none", "text")


WHOLE = [("pixel", 4, True), ("none", 8, True), ("text", 4, False), ("text", 8, False)]
SLOW_WHOLE = [
    pytest.param(*case, marks=pytest.mark.slow) for case in product(KINDS, [4, 8], [True, False]) if case not in WHOLE
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "bits", "symmetric"), [*WHOLE, *SLOW_WHOLE])
def test_whole_networks_are_as_near_to_float64_as_float32_is(tmp_path, kind, bits, symmetric):
    """Over 8 inputs the median error of the integer network is at most 1.5 times that of the float32 simulation."""
    network, architecture, rows = network_of(kind, tmp_path)
    simulated = Calibration(
        network, architecture, replace(LINEAR, weight_bit=bits, a_sym=symmetric), CalibrationConfig(), rows
    ).run()
    integer, exact = to_integer(simulated), copy.deepcopy(simulated).double()
    errors = {"integer": [], "simulated": []}
    for i in range(8):
        inputs = tuple(part[i : i + 1] for part in rows.inputs)
        found = integer(*inputs)
        assert type(found) is torch.Tensor and found.shape == inputs[0].shape
        reference = exact(*(part.double() for part in inputs))
        errors["integer"].append(golden.relative_error(found.double(), reference))
        errors["simulated"].append(golden.relative_error(simulated(*inputs).double(), reference))
    if right(simulated):
        assert statistics.median(errors["integer"]) <= 1.5 * statistics.median(errors["simulated"])
    skip_numbers(right(simulated))


@torch.no_grad()
def test_bfloat16_between_the_products_costs_no_more_than_its_rounding(operators, tmp_path):
    compared = []
    for kind, bits in product(KINDS, [4, 8]):
        network, architecture, rows = network_of(kind, tmp_path)
        simulated = Calibration(
            network, architecture, replace(LINEAR, weight_bit=bits), CalibrationConfig(), rows
        ).run()
        inputs = tuple(part[::8] for part in rows.inputs)
        integer, exact = to_integer(simulated), simulated(*inputs)
        seen = set()
        for module in integer.modules():
            if isinstance(module, cpu.IntegerLinear):
                module.register_forward_hook(lambda _, args, output, seen=seen: seen.add(output.dtype))
            if isinstance(module, cpu.IntegerConv2d) and all(part.coef is None for part in module.parts):
                module.register_forward_hook(lambda _, args, output, seen=seen: seen.add(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            found, half = integer(*inputs), simulated(*inputs)
        assert seen == {torch.bfloat16}, (kind, bits)
        compared.append(right(simulated))
        if compared[-1]:
            error = golden.relative_error(found.float(), exact)
            assert 1e-4 < error < 1.5 * golden.relative_error(half.float(), exact), (kind, bits)
    skip_numbers(all(compared))


@torch.no_grad()
def test_bfloat16_keeps_what_weight_zero_points_leave(operators):
    """An outlier in each channel moves zero points away from 128: the correction then cancels most of the product."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(64, 32, size, padding=size // 2) for size in (1, 3)]
    for conv in convolutions:
        conv.weight.data.flatten(1)[:, 0] = 3 * conv.weight.abs().amax((1, 2, 3)).data
    linear = nn.Linear(64, 32)
    linear.weight.data[:, 0] = 3 * linear.weight.abs().amax(1).data
    x = nn.functional.silu(torch.randn(2, 64, 8, 8))
    cases = [(conv, QuantConv2d, x) for conv in convolutions] + [
        (linear, QuantLinear, x.permute(0, 2, 3, 1).flatten(1, 2))
    ]
    compared = []
    for layer, kind, inputs in cases:
        quantized = quantized_layer(layer, kind, 8, False, "max", inputs)
        assert quantized.weight_quantizer.zero_point.max() < 90
        exact = copy.deepcopy(quantized).double()(inputs.double())
        with torch.autocast("cpu", torch.bfloat16):
            found, half = cpu.integer_form(quantized)(inputs) + 0, quantized(inputs)
        assert found.shape == half.shape
        compared.append(right(quantized))
        if compared[-1]:
            assert golden.relative_error(found.double(), exact) < golden.relative_error(half.double(), exact)
    skip_numbers(all(compared))


@torch.no_grad()
def test_autocast_keeps_integer_products(tmp_path):
    network, architecture, rows = network_of("text", tmp_path)
    simulated = Calibration(
        network, architecture, replace(LINEAR, sm_abit=16, a_sym=False), CalibrationConfig(), rows
    ).run()
    integer = to_integer(simulated)
    with torch.autocast("cpu", torch.bfloat16):
        found = integer(*rows.inputs)
    assert golden.relative_error(found.float(), simulated(*rows.inputs)) < 0.1
    formed = [
        path
        for path, layer in integer.named_modules()
        if isinstance(layer, QuantLinear | QuantConv2d) and layer._weight is not None
    ]
    assert not formed  # no product fell back to its dequantized weight


@torch.no_grad()
def test_timestep_groups_and_mixed_samples():
    network = tiny.unet()
    rows = tiny.rows(network)
    simulated = Calibration(
        network, PIXEL, replace(LINEAR, time_bounds=timestep_group_bounds(rows, 3)), CalibrationConfig(), rows
    ).run()
    integer, exact = to_integer(simulated), copy.deepcopy(simulated).double()
    times = rows.inputs[1][::16].contiguous()
    assert set(torch.bucketize(times, simulated.timestep_groups.bounds, right=True).tolist()) == {0, 1, 2}
    for chosen in (
        *(slice(start, start + 2) for start in range(0, len(rows), 16)),
        slice(0, None, 9),
    ):  # one time step, several
        inputs = tuple(part[chosen] for part in rows.inputs)
        assert golden.relative_error(integer(*inputs).double(), exact(*(part.double() for part in inputs))) < 0.05


def test_what_cannot_run_on_integers_stays(network, rows, monkeypatch):
    simulated = Calibration(network, PIXEL, LINEAR, CalibrationConfig(), rows).run()
    weights_only = Calibration(network, PIXEL, replace(LINEAR, quant_act=False), CalibrationConfig(), rows).run()
    assert apply_engine(weights_only, "auto") is weights_only
    with pytest.raises(ConfigError, match=r"^engine integer: activations"):
        apply_engine(weights_only, "integer")
    with pytest.raises(ConfigError, match="not quantized"):
        apply_engine(network, "integer")
    assert apply_engine(simulated, "simulated") is simulated
    assert apply_engine(simulated, "auto") is simulated  # layers of few weights: integers are not faster
    assert apply_engine(simulated, "integer") is not simulated
    monkeypatch.setattr(speed, "MIN_WEIGHTS", 0)
    assert apply_engine(simulated, "auto") is not simulated
    monkeypatch.setattr(probe, "why_unavailable", lambda: "no VNNI")
    assert apply_engine(simulated, "auto") is simulated
    with pytest.raises(ConfigError, match="no VNNI"):
        apply_engine(simulated, "integer")


@torch.no_grad()
def test_operations_in_place_reach_activations_between_products(operators):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    layer = cpu.IntegerConv2d(quantized_layer(nn.Conv2d(8, 6, 3, padding=1), QuantConv2d, 8, False, "mse", x))
    plain, z = layer(x) + 0, torch.randn(2, 6, 5, 5)

    def assign(y):
        y[:, 1] = 0

    def increase(y):
        y += z

    changes = [
        lambda y: y.mul_(2),
        lambda y: y.mul_(y),
        lambda y: nn.functional.relu_(y),
        lambda y: nn.functional.silu(y, inplace=True),
        lambda y: torch.mul(y, 3, out=y),
        lambda y: torch.add(z, y, out=y),
        assign,
        increase,
    ]
    for change in changes:
        found, expected = layer(x), plain.clone()
        silu = nn.functional.silu(found)  # shares the product with `found`
        change(found)
        change(expected)
        assert isinstance(found, DeferredTensor) and golden.relative_error(found + 0, expected) < 1e-6
        assert golden.relative_error(silu + 0, nn.functional.silu(plain)) < 1e-6
    found = layer(x)
    assert found.mul_(2) is found
    for total in (torch.add(found, other=z), torch.add(input=z, other=found), torch.add(found, z, out=torch.empty(0))):
        assert torch.equal(total, found + z)
    assert torch.equal(torch.mul(found, other=z), found * z)
    with pytest.raises(RuntimeError, match="resize_"):
        layer(x).resize_(3)


@torch.no_grad()
def test_the_result_of_a_network_is_an_ordinary_tensor(operators):
    network = tiny.unet()
    rows = tiny.rows(network)
    integer = to_integer(Calibration(network, PIXEL, LINEAR, CalibrationConfig(), rows).run())
    found = integer(*(part[:2] for part in rows.inputs))
    assert type(found) is torch.Tensor and found.clamp_(0, 0).abs().max() == 0


@torch.no_grad()
def test_auto_leaves_attentions_of_small_depth_simulated(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(speed, "MIN_WEIGHTS", 0)
    network = tiny.unet()
    rows = tiny.rows(network)
    inputs = tuple(part[:2] for part in rows.inputs)
    simulated = Calibration(network, PIXEL, LINEAR, CalibrationConfig(), rows).run()
    row = speed.row()._replace(min_depth=32)  # heads have 32 channels, and there are 16 pixels
    monkeypatch.setattr(speed, "row", lambda: row)
    calls = []
    original = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, **named: calls.append(a.shape[1]) or original(a, b, **named))
    apply_engine(simulated, "auto")(*inputs)
    assert calls and set(calls) == {32}
    assert "attention matmuls of a depth below 32: simulated, which is faster" in caplog.text
    calls.clear()
    pickle.loads(pickle.dumps(apply_engine(simulated, "auto")))(*inputs)
    assert set(calls) == {32}
    calls.clear()
    apply_engine(simulated, "integer")(*inputs)
    assert set(calls) == {16, 32}


@torch.no_grad()
def test_a_prepared_network_is_on_its_own(monkeypatch):
    monkeypatch.setattr(speed, "MIN_WEIGHTS", 0)
    network = tiny.unet()
    rows = tiny.rows(network)
    inputs = tuple(part[:2] for part in rows.inputs)
    simulated = Calibration(
        network,
        PIXEL,
        replace(LINEAR, sm_abit=16, time_bounds=timestep_group_bounds(rows, 2)),
        CalibrationConfig(),
        rows,
    ).run()
    integer = apply_engine(simulated)
    expected = integer(*inputs)
    assert apply_engine(integer) is integer and to_integer(integer) is integer
    copies = [copy.deepcopy(integer), pickle.loads(pickle.dumps(integer))]
    simulated.double()
    for found in (integer, *copies):
        assert torch.equal(found(*inputs), expected)


@torch.no_grad()
def test_inputs_that_the_operators_cannot_take_are_simulated():
    cases = [
        (quantized_layer(nn.Linear(8, 6), QuantLinear, 4, False, "max", torch.randn(4, 8)), [torch.randn(4, 8)]),
        (
            quantized_layer(nn.Conv1d(8, 6, 1), QuantConv1d, 4, False, "max", torch.randn(4, 8, 5)),
            [torch.randn(4, 8, 5)],
        ),
        (
            quantized_layer(nn.Conv2d(8, 6, 3), QuantConv2d, 4, False, "max", torch.randn(4, 8, 5, 5)),
            [torch.randn(4, 8, 5, 5)],
        ),
        (attention_matmul(True, 8), [torch.rand(4, 7, 8), torch.randn(4, 8, 5)]),
    ]
    for layer, inputs in cases:
        integer = cpu.integer_form(layer)
        empty = [x[:0] for x in inputs]
        assert integer(*empty).shape == layer(*empty).shape
        meta = integer.to("meta")(*(x.to("meta") for x in inputs))
        assert meta.is_meta and meta.shape == copy.deepcopy(layer)(*(x.to("meta") for x in inputs)).shape


def test_a_network_without_parameters_is_returned():
    network = nn.Identity()
    assert apply_engine(network) is network


@torch.no_grad()
@pytest.mark.parametrize("kind", [QuantConv2d, QuantLinear, QuantMatMul])
def test_zero_points_whose_sums_leave_int32_are_simulated(kind):
    torch.manual_seed(0)
    shape = (2, 64, 6, 6) if kind is QuantConv2d else (2, 6, 512)
    for x in (torch.rand(shape) + 1e4, torch.full(shape, 0.5)):
        if kind is QuantMatMul:
            layer = QuantMatMul({"q": ActQuantizer(8, False), "k": ActQuantizer(8, False)})
            inputs = (x, x.transpose(1, 2) - x.mean())
            for quantizer, part in zip(layer.act_quantizers, inputs, strict=True):
                quantizer.set_qparams(*choose_qparams(part, 8, method="mse"))
                quantizer.enabled = True
        else:
            inputs = (x,)
            layer = nn.Conv2d(64, 8, 3) if kind is QuantConv2d else nn.Linear(512, 8)
            layer = quantized_layer(layer, kind, 8, False, "mse", x)
        assert torch.equal(cpu.integer_form(layer)(*inputs), layer(*inputs))


@torch.no_grad()
def test_zero_points_far_out_are_exact(operators):
    torch.manual_seed(0)
    x = (torch.randint(0, 256, (2, 12, 5, 5)) + 100_000) / 64
    layer = quantized_layer(nn.Conv2d(12, 8, 3, padding=1), QuantConv2d, 4, False, "max", x)
    layer.act_quantizer.set_qparams(torch.tensor(1 / 64), torch.tensor(-100_000.0))
    integer = cpu.IntegerConv2d(layer)
    assert integer.obstacle is None
    check(layer, x)


def test_a_user_without_a_home_folder_runs_without_compiled_operators(monkeypatch, caplog):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cpu_kernels.Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("CXX", sys.executable)  # never run
    assert cpu_kernels.library.__wrapped__() is None and "home directory" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("mean", [0, 30, 1000, 100_000])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_statistics_are_those_of_float64(operators, mean, shifted):
    torch.manual_seed(0)
    data, coef, sums = torch.randn(2, 150, 13), torch.randn(12) / 8, torch.randn(2, 150)
    data[..., :12] += mean * (0.5 if shifted else 1)
    shift = torch.randn(2, 12) + mean / 2 if shifted else None
    rows = cpu_kernels.ChannelsLastView(data, 2, 150, 12, 13, (coef, sums))
    found = rows.stats(shift, 3, 1e-5)
    values = (
        data[..., :12].double() - coef.double() * sums[..., None].double() + (shift.double()[:, None] if shifted else 0)
    )
    variance, expected = torch.var_mean(values.unflatten(2, (3, 4)), dim=(1, 3), unbiased=False)
    scale = variance.sqrt()
    # float32 itself holds values of this size to mean * 6e-8
    assert ((found[0] - expected).abs() / scale).max() < 1e-6 + mean * 1.2e-7
    assert (found[1] * (variance + 1e-5).sqrt() - 1).abs().max() < 1e-6 + mean * 1e-8


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_without_a_compiler_are_the_same(dtype):
    if cpu_kernels.library() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    data, coef, sums = torch.randn(2, 35, 13).to(dtype), torch.randn(12), torch.randn(2, 35)
    rows = cpu_kernels.ChannelsLastView(data, 2, 35, 12, 13, (coef, sums))
    shift, a, b, other = torch.randn(2, 12), torch.rand(2, 12), torch.randn(2, 12), torch.randn(2, 35, 12).to(dtype)
    compiled = [*rows.stats(shift, 4, 1e-5), rows.values((a, b), True, other), rows.values(None, False)]
    grids = [
        cpu_kernels.IntegerGrid(0.05, -128, 127, 128),
        cpu_kernels.IntegerGrid(0.05, -128, 127, 0, b.exp()[0], torch.int8),
        cpu_kernels.IntegerGrid(0.0002, -32768, 32767, 32768, b.exp()[1], torch.uint16),
    ]
    quantized_compiled = [rows.quantize((a, b), True, grid) for grid in grids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "library", lambda: None)
        plain = [*rows.stats(shift, 4, 1e-5), rows.values((a, b), True, other), rows.values(None, False)]
        quantized_plain = [rows.quantize((a, b), True, grid) for grid in grids]
    for found, expected in zip(compiled, plain, strict=True):
        # bfloat16: a few results lie on the edge between two
        assert found.dtype == expected.dtype
        assert golden.relative_error(found.float(), expected.float()) < (1e-6 if found.dtype == torch.float32 else 1e-4)
    for grid, (found, sums), (expected, expected_sums) in zip(grids, quantized_compiled, quantized_plain, strict=True):
        wide = grid.dtype == torch.uint16
        assert {byte.dtype for byte in (*found, *expected)} == {torch.uint8 if wide else grid.dtype}
        integers, expected = (planes[0].int() + (256 * planes[1].int() if wide else 0) for planes in (found, expected))
        assert (integers - expected).abs().max() <= 1
        assert (integers != expected).float().mean() < (0.1 if wide else 0.001)  # the steps of 16 bits are small
        assert torch.equal(sums, integers.sum(2, dtype=torch.int32))
        assert torch.equal(expected_sums, expected.sum(2, dtype=torch.int32))
        assert integers.float().std() > (1000 if wide else 3)
