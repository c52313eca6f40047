"""What a calibration says of itself: errors of the output, the worst layers, warnings, tables."""

import copy
import csv
import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qdiff
from ddim.family import PIXEL
from qdiff.architecture import Architecture
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.report import (
    ACTIVATIONS,
    CALIBRATED,
    NEAREST,
    WEIGHTS,
    Quality,
    layer_effects,
    log_quality,
    output_errors,
    report_quality,
)
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.model import act_quantizers, enable_activations, quant_layers
from tests.support import tiny

FORMATS = QuantConfig(weight_bit=4, quant_act=True, split=True)
RECIPE = CalibrationConfig(num_timesteps=4, samples=16, iters=3, iters_a=2)


@pytest.fixture(scope="module")
def network():
    return tiny.unet()


@pytest.fixture(scope="module")
def samples(network):
    return tiny.rows(network).split(0.25, seed=0)


@pytest.fixture(scope="module")
def quantized(network, samples):
    return Calibration(network, PIXEL, FORMATS, RECIPE, samples).nearest()


def relative(found, target):
    return (found - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)


@torch.no_grad()
def test_errors_of_the_output_are_of_the_validation_samples_in_both_modes(network, samples, quantized):
    inputs = [part[list(samples.validation)] for part in samples.inputs]
    target = network(*inputs)
    expected = {ACTIVATIONS: relative(quantized(*inputs), target).mean().item()}
    enable_activations(quantized, False)
    expected[WEIGHTS] = relative(quantized(*inputs), target).mean().item()
    enable_activations(quantized, True)
    seen = []
    found = output_errors(network, {"one": quantized, "two": quantized}, samples, seen.append)
    assert found["one"] == pytest.approx(expected, rel=1e-4) and found["one"] == found["two"]
    assert found["one"][WEIGHTS] < found["one"][ACTIVATIONS]
    assert sum(seen) == len(samples.validation) * 5  # full precision, and two networks in two modes
    assert all(quantizer.enabled for quantizer in act_quantizers(quantized).values())


def test_weights_only_have_one_error_and_an_output_of_zeros_none(network, samples):
    weights = Calibration(network, PIXEL, QuantConfig(weight_bit=4, split=True), RECIPE, samples).nearest()
    found = output_errors(network, {"weights": weights}, samples)
    assert set(found["weights"]) == {WEIGHTS} and 0 < found["weights"][WEIGHTS] < 1
    silent = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
    data = CalibrationData((torch.randn(8, 3, 4, 4),)).split(0.25, 0)
    assert output_errors(silent, {"same": silent}, data) == {"same": {WEIGHTS: 0.0}}


class Chain(nn.Module):
    """A linear network with one number as its output: here the estimate of an effect is exact."""

    def __init__(self, layers: int = 3):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def nearest_of(model, data):
    architecture = Architecture("chain", make_unet=lambda _: model, blocks={})
    return Calibration(model, architecture, FORMATS, CalibrationConfig(), data).nearest()


def test_effects_of_a_linear_network_are_those_of_its_layers_alone():
    model = Chain().requires_grad_(False)
    data = CalibrationData((torch.randn(64, 6),)).split(0.125, 0)  # as many as the estimate takes
    quantized = nearest_of(model, data)
    effects = layer_effects(model, quantized, data)
    assert list(effects) == ["layers.0", "layers.1", "layers.2", "last"]
    inputs = data.inputs[0][list(data.validation)]
    target = model(inputs)
    for path, effect in effects.items():
        alone = Chain().requires_grad_(False)
        alone.set_submodule(path, quantized.get_submodule(path))
        expected = relative(alone(inputs), target).square().mean().sqrt()
        assert effect == pytest.approx(expected.item(), rel=1e-3) and effect > 0
    assert not any(module._forward_hooks for module in model.modules())


def test_effects_are_near_those_of_a_network_with_one_quantized_layer(network, quantized):
    """In a network with attention, shortcuts and a time embedding."""
    samples = tiny.rows(network).split(0.125, seed=0)
    effects = layer_effects(network, quantized, samples)
    inputs = [part[list(samples.validation)] for part in samples.inputs]
    target, ratios = network(*inputs), {}
    for path, effect in effects.items():
        alone = copy.deepcopy(network)
        alone.set_submodule(path, quantized.get_submodule(path))
        ratios[path] = effect / relative(alone(*inputs), target).square().mean().sqrt().item()
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


class Tokens(nn.Module):
    """Attention by a function call; inputs by keyword, and two outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, sample, timestep):
        q, k, v = self.qkv(sample + timestep[:, None, None] / 100).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(3 * q, 3 * k, v)), {"time": timestep}


def test_attention_matmuls_of_function_calls_have_effects(caplog):
    caplog.set_level(logging.INFO, "qdiff.calibration.report")
    model = Tokens()
    inputs = {"sample": torch.randn(64, 6, 8), "timestep": torch.arange(64.0)}
    quantized = qdiff.quantize(
        model, inputs, weight_bit=8, act_bit=4, preset="fast", iters=2, iters_a=1, iters_tune=0, validation_fraction=0.1
    )
    assert "relative error of the output on 6 validation samples: nearest" in caplog.text
    assert "could not be made" not in caplog.text
    data = CalibrationData(tuple(inputs.values())).split(0.125, 0)
    effects = layer_effects(model, quantized, data)
    assert set(effects) == {"qkv", "matmul_0", "matmul_1", "out"}
    assert not hasattr(model, "matmul_0") and "forward" not in vars(model)
    samples = [part[list(data.validation)] for part in data.inputs]
    target = model(*samples)[0]
    for path in ("matmul_0", "matmul_1"):
        alone = copy.deepcopy(quantized)
        for quantizer in act_quantizers(alone).values():
            quantizer.enabled = quantizer.name.startswith(path)
        alone.set_submodule("qkv", model.qkv), alone.set_submodule("out", model.out)
        exact = relative(alone(*samples)[0], target).square().mean().sqrt().item()
        assert 0.5 < effects[path] / exact < 2, path


def test_effects_follow_the_activations(network, samples, quantized):
    with_activations = layer_effects(network, quantized, samples)
    enable_activations(quantized, False)
    weights = layer_effects(network, quantized, samples)
    enable_activations(quantized, True)
    products = [path for path in with_activations if path not in quant_layers(quantized)]
    assert products and all(with_activations[path] > 0 == weights[path] for path in products)


def test_timestep_groups_have_effects(network, samples):
    formats = QuantConfig(weight_bit=8, quant_act=True, split=True, time_bounds=(500.0,))
    quantized = Calibration(network, PIXEL, formats, RECIPE, samples).nearest()
    assert all(math.isfinite(effect) and effect > 0 for effect in layer_effects(network, quantized, samples).values())


def test_a_network_without_gradients_has_no_effects():
    class Closed(Chain):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    data = CalibrationData((torch.randn(16, 6),)).split(0.25, 0)
    model = Closed().requires_grad_(False)
    assert layer_effects(model, nearest_of(model, data), data) == {}


@pytest.mark.parametrize(
    ("calibrated", "warnings"),
    [
        ({WEIGHTS: 0.1, ACTIVATIONS: 0.2}, []),
        ({WEIGHTS: 0.25, ACTIVATIONS: 0.2}, ["worse than nearest rounding, weights only"]),
        ({WEIGHTS: 0.1, ACTIVATIONS: 0.29}, ["worse than nearest rounding, with activations"]),
        ({WEIGHTS: 0.1, ACTIVATIONS: 0.31}, ["worse than nearest rounding, with", "0.31, with activations: expected"]),
        ({WEIGHTS: 0.1, ACTIVATIONS: math.nan}, ["nan, with activations: expected at most 0.3"]),
    ],
)
def test_warnings(caplog, calibrated, warnings):
    errors = {NEAREST: {WEIGHTS: 0.2, ACTIVATIONS: 0.28}, CALIBRATED: calibrated}
    log_quality(Quality(errors, {"a": 0.1}, 8), grouped=False)
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(found) == len(warnings)
    assert all(expected in message for expected, message in zip(warnings, found, strict=True))


@pytest.mark.parametrize("grouped", [False, True])
def test_timestep_groups_are_named_where_they_could_help(caplog, grouped):
    log_quality(Quality({NEAREST: {WEIGHTS: 0.4, ACTIVATIONS: 0.5}}, {}, 8), grouped)
    weights, activations = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "timestep_groups" not in weights and ("timestep_groups" in activations) != grouped


def test_nearest_rounding_alone_is_judged_too(caplog):
    log_quality(Quality({NEAREST: {WEIGHTS: 0.4}}, {}, 8), grouped=False)
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]


def test_the_five_worst_layers_are_named_in_order(caplog):
    caplog.set_level(logging.INFO)
    effects = {f"layer{number}": number / 100 for number in range(8)}
    log_quality(Quality({NEAREST: {WEIGHTS: 0.1}}, effects, 8), grouped=False)
    assert "layer7 0.07, layer6 0.06, layer5 0.05, layer4 0.04, layer3 0.03" in caplog.text
    assert "layer2" not in caplog.text


def test_every_calibration_ends_with_its_errors(caplog, capsys, network, samples, tmp_path):
    caplog.set_level(logging.INFO, "qdiff.calibration.report")
    model = Chain()
    qdiff.quantize(model, (torch.randn(32, 6),), preset="fast", iters=2, iters_a=1, iters_tune=1)
    assert "relative error of the output on 4 validation samples: nearest" in caplog.text
    assert "; calibrated " in caplog.text and "layers with the largest effect" in caplog.text
    assert "report: 100%" in capsys.readouterr().err
    caplog.clear()
    calibration = Calibration(network, PIXEL, FORMATS.linear(), RECIPE, samples)
    calibration.report(tmp_path, calibration.run())
    assert "validation samples: nearest" in caplog.text and "calibrated" not in caplog.text
    with (tmp_path / "network.csv").open(newline="") as file:
        assert [line["network"] for line in csv.DictReader(file)] == [NEAREST]


def test_the_tables_hold_what_the_log_says(network, samples, quantized, tmp_path):
    report_quality(tmp_path, network, quantized, lambda: quantized, samples)
    with (tmp_path / "network.csv").open(newline="") as file:
        lines = {line["network"]: line for line in csv.DictReader(file)}
    errors = output_errors(network, {NEAREST: quantized}, samples)[NEAREST]
    for name in (NEAREST, CALIBRATED):
        found = {mode: float(lines[name][f"error of the output, {mode}"]) for mode in (WEIGHTS, ACTIVATIONS)}
        assert found == pytest.approx(errors, rel=1e-5)
    with (tmp_path / "layers.csv").open(newline="") as file:
        layers = {line["layer"]: line for line in csv.DictReader(file)}
    effects = layer_effects(network, quantized, samples)
    assert {path: float(line["effect on the output"]) for path, line in layers.items()} == pytest.approx(
        effects, rel=0.01
    )
    assert float(layers["conv_in"]["nearest SQNR dB"]) > 5 and (tmp_path / "layers.png").is_file()
    products = set(layers) - set(quant_layers(quantized))
    assert products and all(layers[path]["calibrated SQNR dB"] == "" for path in products)
