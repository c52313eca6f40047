"""The GPU engine's logic, on the CPU: the same integers and formulas, packed."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddim.family import PIXEL
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig
from qdiff.engines.cuda import Int8Linear, PackedLayer, fuse_attention, to_packed
from qdiff.engines.select import apply_engine, on_gpu
from qdiff.errors import ConfigError
from qdiff.layers import MatMul, QuantConv2d, QuantLinear
from tests.support import tiny
from tests.support.engines import INT_MM_SATURATES, LINEAR, network_of, quantized_layer, skip_numbers


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_layers_are_the_simulation(bits):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 6, 6)
    layer = quantized_layer(nn.Conv2d(7, 5, 3, padding=1), QuantConv2d, bits, False, "max", x, split=3)
    expected = layer(x)
    packed = PackedLayer(copy.deepcopy(layer))
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x), expected)  # nothing is used up
    wide = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(packed(wide), expected, atol=1e-5)
    stored = sum(weight.integers.numel() for weight in packed.weights)
    assert stored == {3: 5 * 63, 4: (5 * 27 + 1) // 2 + 5 * 36 // 2, 8: 5 * 63}[bits]
    assert all(quantizer.integers.numel() == 0 for quantizer in packed.layer.weight_quantizers)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    """Whether numbers agree; where `torch._int_mm` saturates only the shape is looked at."""
    assert found.shape == expected.shape
    return INT_MM_SATURATES is not None or bool((found.double() - expected).norm() / expected.norm() < tolerance)


@torch.no_grad()
def test_int8_linear_layers_are_exact():
    for bits, symmetric, shape in itertools.product([4, 8], [False, True], [(40, 16), (3, 17, 16)]):
        torch.manual_seed(1)
        x = torch.randn(shape) + 0.3
        layer = quantized_layer(nn.Linear(16, 24), QuantLinear, bits, symmetric, "max", x)
        assert Int8Linear.obstacle(layer) is None
        expected = copy.deepcopy(layer).double()(x.double())
        found = Int8Linear(PackedLayer(copy.deepcopy(layer)))(x)
        assert near(found, expected), (bits, symmetric, shape)
    skip_numbers(INT_MM_SATURATES is None)


@torch.no_grad()
def test_wide_int8_linear_layers_are_exact():
    for bits in (4, 8):
        torch.manual_seed(0)
        x = torch.nn.functional.silu(torch.randn(32, 2560) * 2)
        layer = quantized_layer(nn.Linear(2560, 64), QuantLinear, bits, False, "max", x)
        act, weight = layer.act_quantizer, layer.weight_quantizer
        q = torch.clamp(torch.round(x / act.scale) + act.zero_point, 0, 255)
        expected = (q.double() - act.zero_point) * act.scale @ weight.dequantize().double().T + layer.bias
        assert near(Int8Linear(PackedLayer(layer))(x), expected), bits
    skip_numbers(INT_MM_SATURATES is None)


def test_what_does_not_fit_int8_is_told_apart():
    x = torch.randn(20, 16)

    def fits(layer, bits=8):
        return Int8Linear.obstacle(quantized_layer(layer, QuantLinear, bits, True, "max", x)) is None

    assert fits(nn.Linear(16, 8)) and not fits(nn.Linear(16, 9)) and not fits(nn.Linear(16, 8), bits=12)
    far = quantized_layer(nn.Linear(16, 8), QuantLinear, 8, False, "mse", x.clamp(0, 1) + 1e4)
    assert far.act_quantizer.zero_point.abs() > 1e6 and "32 bits" in Int8Linear.obstacle(far)
    far.act_quantizer.zero_point.fill_(100.5)
    assert "fractional" in Int8Linear.obstacle(far)
    off = quantized_layer(nn.Linear(16, 8), QuantLinear, 8, True, "max", x)
    off.act_quantizer.enabled = False
    assert "one scale" in Int8Linear.obstacle(off)


def test_few_rows_run_as_the_packed_layer():
    x = torch.randn(16, 16)
    packed = PackedLayer(quantized_layer(nn.Linear(16, 24), QuantLinear, 4, True, "max", x))
    assert torch.equal(Int8Linear(packed)(x), packed(x))


def simulated(kind, folder):
    """A tiny quantized network of a family and inputs of it."""
    model, architecture, rows = network_of(kind, folder)
    return Calibration(model, architecture, replace(LINEAR, a_sym=False), CalibrationConfig(), rows).run(), tuple(
        part[:4] for part in rows.inputs
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pixel", "text"])
def test_whole_networks_are_the_simulation(kind, tmp_path):
    network, inputs = simulated(kind, tmp_path)
    expected = network(*inputs)
    before = {path: tensor.clone() for path, tensor in network.state_dict().items()}
    packed = to_packed(network, int8_products=False)
    assert torch.equal(packed(*inputs), expected)
    assert apply_engine(packed) is packed and torch.equal(copy.deepcopy(packed)(*inputs), expected)
    assert all(
        torch.equal(before[path], tensor) for path, tensor in network.state_dict().items()
    )  # the original is untouched
    with torch.autocast("cpu", torch.bfloat16):
        half = packed(*inputs)
    assert (half.float() - expected).norm() / expected.norm() < 0.2
    found = on_gpu(network, int8_products=True)(*inputs)
    assert found.shape == expected.shape
    skip_numbers(INT_MM_SATURATES is None)
    assert torch.allclose(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_int8_products_that_would_not_be_used_are_refused():
    network = tiny.unet()
    quantized = Calibration(network, PIXEL, replace(LINEAR, act_bit=16), CalibrationConfig(), tiny.rows(network)).run()
    with pytest.raises(ConfigError, match=r"^engine integer: no linear layer"):
        on_gpu(quantized, int8_products=True)
    with pytest.raises(ConfigError, match="not quantized"):
        on_gpu(network, int8_products=True)


@torch.no_grad()
def test_attention_is_fused_where_nothing_is_quantized(tmp_path):
    network, x, t = tiny.unet(), torch.randn(2, 3, 8, 8), torch.full((2,), 500.0)
    expected = network.double()(x.double(), t.double())
    calls = []
    handles = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for module in network.modules()
        if isinstance(module, MatMul)
    ]
    fused = fuse_attention(network)(x.double(), t.double())
    assert not calls and handles
    assert (fused - expected).norm() / expected.norm() < 1e-12
    quantized, _ = simulated("pixel", tmp_path)
    fuse_attention(quantized)
    assert not any(getattr(module, "fused", False) for module in quantized.modules())


def test_zero_points_outside_the_range_stay_exact():
    """After the `mse` rule a zero point may lie outside 0 ... 2^n - 1."""
    torch.manual_seed(3)
    x = torch.rand(40, 16) + 2
    linear = nn.Linear(16, 24)
    nn.init.uniform_(linear.weight, 0.5, 1.0)
    layer = quantized_layer(linear, QuantLinear, 8, False, "mse", x)
    expected = copy.deepcopy(layer).double()(x.double())
    assert near(Int8Linear(PackedLayer(layer))(x), expected)
    skip_numbers(INT_MM_SATURATES is None)
