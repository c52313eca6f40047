"""Processors without VNNI: what is exact there runs on integers, what is not is simulated and named.

On a processor with VNNI these tests run in a process of their own, in which oneDNN and PyTorch are limited to AVX2.
"""

import copy
import logging
import os
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddim.family import PIXEL
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig
from qdiff.engines import cpu, cpu_kernels, probe, speed
from qdiff.engines.cpu import to_integer
from qdiff.engines.select import apply_engine
from qdiff.layers import QuantConv2d, QuantLinear
from tests.support import golden, tiny
from tests.support.engines import (
    LINEAR,
    attention_matmul,
    check,
    network_of,
    network_of_policy,
    on_grid,
    quantized_layer,
)

HAS_VNNI = probe.why_unavailable() is None and probe.largest_exact_weight() == probe.LARGEST_BYTE
there = pytest.mark.skipif(HAS_VNNI, reason="this processor has VNNI; the tests run in a process that does without")


@pytest.mark.multiprocess
@pytest.mark.skipif(not HAS_VNNI, reason="this processor has no VNNI: the tests run in this process")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_all_of_this_file_passes_in_a_process_without_vnni(chosen):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", chosen, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed, 1 skipped" in result.stdout  # none but this one


@there
def test_the_probe_finds_what_is_exact():
    assert probe.why_unavailable() is None
    assert probe.largest_exact_weight() == 64 and not probe.attention_is_exact()
    assert probe.kind() == "AVX2" and speed.row() is speed.ROWS["AVX2"]


@there
@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("act_bit", [8, 16])
def test_products_of_up_to_6_bit_weights_are_exact(operators, bits, act_bit):
    torch.manual_seed(bits)
    x = torch.randn(2, 12, 9, 7) * 3 + 0.5
    for geometry in ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}, {"kernel_size": 3, "stride": 2}):
        layer = quantized_layer(nn.Conv2d(12, 96, **geometry), QuantConv2d, bits, False, "max", x, act_bit=act_bit)
        assert cpu.integer_form(layer).obstacle is None and check(layer, on_grid(layer, x))
    x = torch.randn(3, 5, 24)
    layer = quantized_layer(nn.Linear(24, 17), QuantLinear, bits, False, "max", x, act_bit=act_bit)
    assert cpu.integer_form(layer).obstacle is None and check(layer, on_grid(layer, x))


@there
@torch.no_grad()
def test_the_largest_exact_products_are_exact(operators):
    """Bytes of 255 and weights of 64, which are the largest there can be."""
    x = torch.full((2, 64, 5, 5), 255.0)
    x[0, 0, 0, 0] = 0  # so that the scale is 1
    layer = quantized_layer(nn.Conv2d(64, 8, 3, padding=1), QuantConv2d, 8, False, "max", x)
    (quantizer,) = layer.weight_quantizers
    quantizer.zero_point.fill_(64)
    for integer, exact in ((0, True), (128, True), (129, False)):  # -64, 64, 65
        layer.set_integers([torch.full_like(quantizer.integers, integer)])
        proxy = cpu.integer_form(layer)
        assert (proxy.obstacle is None) == exact
        if exact:
            assert check(layer, x)
        else:
            assert torch.equal(proxy(x), layer(x))


@there
@torch.no_grad()
def test_8_bit_weights_and_attentions_are_simulated():
    x = torch.randn(2, 12, 9, 7)
    layer = quantized_layer(nn.Conv2d(12, 20, 3), QuantConv2d, 8, False, "max", x)
    proxy = cpu.integer_form(layer)
    assert proxy.obstacle == "weights beyond 64 on a processor without VNNI"
    assert torch.equal(proxy(x), layer(x))
    obstacle = cpu.integer_form(attention_matmul(False, 8)).obstacle
    assert obstacle == "products of 8-bit operands on a processor without VNNI"


@there
@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        *(("pixel", 4), ("none", 8), ("text", 4)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("pixel", 8), ("none", 4), ("text", 8))),
    ],
)
def test_whole_networks_are_as_near_to_float64_as_float32_is(tmp_path, kind, bits):
    network, architecture, rows = network_of(kind, tmp_path)
    quant = replace(LINEAR, weight_bit=bits)
    simulated = Calibration(network, architecture, quant, CalibrationConfig(), rows).run()
    integer, exact = to_integer(simulated), copy.deepcopy(simulated).double()
    errors: dict[str, list[float]] = {"integer": [], "simulated": []}
    for i in range(8):
        inputs = tuple(part[i : i + 1] for part in rows.inputs)
        reference = exact(*(part.double() for part in inputs))
        errors["integer"].append(golden.relative_error(integer(*inputs).double(), reference))
        errors["simulated"].append(golden.relative_error(simulated(*inputs).double(), reference))
    assert statistics.median(errors["integer"]) <= 1.5 * statistics.median(errors["simulated"])


@there
def test_auto_and_integer_say_what_they_choose(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    simulated, *_ = network_of_policy((("mid.block_1.*", "W8"),))
    monkeypatch.setattr(probe, "processor", lambda: "of another name")
    assert apply_engine(simulated, "auto") is simulated
    assert "integers are not faster below 50000" in caplog.text
    caplog.clear()
    assert apply_engine(simulated, "integer") is not simulated
    (line,) = caplog.messages
    assert line.startswith("engine: integer (") and " for AVX2, not measured on this processor; simulated: " in line
    assert "mid.block_1.conv1, mid.block_1.temb_proj" in line
    assert "(weights beyond 64 on a processor without VNNI)" in line
    assert "(products of 8-bit operands on a processor without VNNI)" in line
    monkeypatch.setattr(speed, "MIN_WEIGHTS", 0)
    assert apply_engine(simulated, "auto") is not simulated


@there
def test_a_network_of_8_bit_weights_is_simulated(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    network = tiny.unet()
    rows = tiny.rows(network)
    quant = replace(LINEAR, weight_bit=8)
    simulated = Calibration(network, PIXEL, quant, CalibrationConfig(), rows).run()
    monkeypatch.setattr(speed, "MIN_WEIGHTS", 0)
    assert apply_engine(simulated, "auto") is simulated
    assert "no layer has a form that the integer products take" in caplog.text


@there
def test_the_fused_operators_are_built_for_avx2():
    if cpu_kernels.library() is None:
        pytest.skip("no C++ compiler")
    assert cpu_kernels._instructions() == "x86-64-v3"
