"""The GPU engine's logic, on the CPU: the same integers and formulas, packed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig
from qdiff.engines.cuda import PackedLayer, fuse_attention, to_packed
from qdiff.engines.select import apply_engine
from qdiff.layers import MatMul, QuantConv2d
from tests.support import tiny
from tests.support.engines import LINEAR, network_of, quantized_layer


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
    packed = to_packed(network)
    assert torch.equal(packed(*inputs), expected)
    assert apply_engine(packed) is packed and torch.equal(copy.deepcopy(packed)(*inputs), expected)
    assert all(
        torch.equal(before[path], tensor) for path, tensor in network.state_dict().items()
    )  # the original is untouched
    with torch.autocast("cpu", torch.bfloat16):
        half = packed(*inputs)
    assert (half.float() - expected).norm() / expected.norm() < 0.2


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
    assert not any(getattr(module, "core", None) for module in quantized.modules())
