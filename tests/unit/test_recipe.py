"""The recipe of `fast` and `best`: free of units, never worse than nearest, each mode with parameters of its own."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qdiff
from qdiff.architecture import Architecture
from qdiff.calibration.compensation import Moments, receptive_fields, round_compensated
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.finetune import FineTuner
from qdiff.calibration.rounding import UnitPair, compensate_unit
from qdiff.calibration.sensitivity import SAMPLES, Sensitivity, _over_time, choose_policy, measure_sensitivity
from qdiff.calibration.smoothing import choose_smoothing
from qdiff.config import PRESETS, CalibrationConfig, QuantConfig
from qdiff.layers import QuantConv2d, QuantLinear
from qdiff.model import (
    act_quantizers,
    enable_activations,
    init_weights,
    mode_parameters,
    quant_layers,
    quantize_model,
)
from qdiff.scale_rules import choose_qparams

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
SMALL = {"iters_tune": 3, "iters_tune_a": 3, "batch_tune": 4, "batch_size": 8, "unit_samples": 24}


class Chain(nn.Module):
    """Convolutions, linear layers and ReLU, as the only operations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, stride=2)
        self.third, self.last = nn.Linear(8 * 16, 24), nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(self.third(x.flatten(1))))


def scaled(network, exponents):
    """The same function with the layers' outputs multiplied by powers of two, and the next weights divided."""
    copy = Chain()
    copy.load_state_dict(network.state_dict())
    before = 0
    with torch.no_grad():
        for layer, exponent in zip((copy.first, copy.second, copy.third, copy.last), [*exponents, 0], strict=True):
            layer.weight *= 2.0 ** (exponent - before)
            layer.bias *= 2.0**exponent
            before = exponent
    return copy


@pytest.fixture
def chain():
    torch.manual_seed(3)
    return Chain().eval()


@pytest.fixture
def samples():
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def integers(network):
    return {path: [q.integers for q in layer.weight_quantizers] for path, layer in quant_layers(network).items()}


@pytest.mark.parametrize("weight_bit, act_bit", [(4, 8), (8, 8), (4, None)])
@pytest.mark.parametrize("exponents", [(20, -15, 9), (-12, 13, -20)])
def test_units_of_activations_change_no_rounded_weight(chain, samples, weight_bit, act_bit, exponents):
    def quantized(network, x):
        return qdiff.quantize(network, (x,), weight_bit=weight_bit, act_bit=act_bit, preset="fast", **SMALL)

    first, other = quantized(chain, samples), quantized(scaled(chain, exponents), samples)
    assert {path: str(layer) for path, layer in quant_layers(first).items()} == {
        path: str(layer) for path, layer in quant_layers(other).items()
    }
    for path, values in integers(first).items():
        for one, two in zip(values, integers(other)[path], strict=True):
            assert torch.equal(one, two), path
    assert torch.equal(first(samples), other(samples))


def test_units_of_the_input_change_no_rounded_weight(chain, samples):
    large = Chain()
    large.load_state_dict(chain.state_dict())
    with torch.no_grad():
        large.first.weight /= 2.0**18
    first = qdiff.quantize(chain, (samples,), weight_bit=4, preset="best", **SMALL)
    other = qdiff.quantize(large, (samples * 2.0**18,), weight_bit=4, preset="best", **SMALL)
    for path, values in integers(first).items():
        assert all(torch.equal(one, two) for one, two in zip(values, integers(other)[path], strict=True)), path


def wrapped(network, **formats):
    quant = QuantConfig(weight_scale_method="least_squares", act_scale_method="least_squares", **formats)
    architecture = Architecture("test", make_unet=lambda _: network, blocks={})
    return quantize_model(network, architecture, quant).requires_grad_(False)


@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": "same"}])
def test_receptive_fields_times_weight_are_the_output(geometry):
    layer = nn.Conv2d(6, 5, 3, **{"padding": 1} | geometry)
    quantized = QuantConv2d(layer, 8, 8, False)
    x = torch.randn(3, 6, 9, 7)
    output = layer(x).detach().movedim(1, -1)
    positions = torch.arange(output[..., 0].numel())
    fields = receptive_fields(quantized, x, positions)
    found = fields @ layer.weight.detach().flatten(1).T + layer.bias.detach()
    assert torch.allclose(found, output.flatten(0, -2), atol=1e-5)


def moments_of(layer, full, quantized):
    moments = Moments.zeros(full.shape[1], CPU)
    moments.add(full, quantized, torch.ones(len(full)))
    return moments


def test_compensated_rounding_beats_nearest_and_corrects_the_mean():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    x = torch.randn(4096, 16) @ torch.randn(16, 64) + 0.1 * torch.randn(4096, 64) + 0.5
    target = layer(x).detach()
    nearest, compensated = (QuantLinear(layer, 4, 8, False) for _ in range(2))
    nearest.init_weight_scales("least_squares")
    round_compensated(compensated, moments_of(layer, x, x))
    errors = [(quantized(x) - target).square().mean().item() for quantized in (nearest, compensated)]
    assert errors[1] < 0.35 * errors[0]
    assert (compensated(x) - target).mean(0).abs().max() < 1e-3


def test_compensated_rounding_makes_up_for_other_inputs():
    torch.manual_seed(0)
    layer = nn.Linear(48, 16)
    x = torch.randn(4096, 48)
    other = 0.8 * x + 0.3
    quantized = QuantLinear(layer, 8, 8, False)
    round_compensated(quantized, moments_of(layer, x, other))
    target = layer(x).detach()
    assert (quantized(other) - target).norm() / target.norm() < 0.02
    assert (layer(other).detach() - target).norm() / target.norm() > 0.2


def test_inputs_of_zeros_are_rounded_to_nearest():
    layer = nn.Linear(8, 4)
    quantized, nearest = (QuantLinear(layer, 4, 8, False) for _ in range(2))
    round_compensated(quantized, moments_of(layer, torch.zeros(16, 8), torch.zeros(16, 8)))
    nearest.init_weight_scales("least_squares")
    assert torch.equal(quantized.weight_quantizer.integers, nearest.weight_quantizer.integers)
    assert torch.equal(quantized.bias, layer.bias)


def unit_pair(network, samples, misleading=False):
    """A pair of the whole network as one unit; a misleading one trains on other inputs than it is judged on."""
    full, quantized = wrapped(network, weight_bit=4), wrapped(network, weight_bit=4)

    def run(unit, index):
        x = samples[index]
        is_training = not isinstance(index, slice)
        return unit(x.roll(1, 1) * torch.tensor([1.0, 1e3, -1e3]).view(1, 3, 1, 1) if misleading and is_training else x)

    return UnitPair(full, quantized, run, run, torch.arange(32), range(32, 40), 16)


def test_a_unit_that_comes_out_worse_keeps_nearest(chain, samples):
    nearest = wrapped(chain, weight_bit=4)
    init_weights(nearest, "least_squares")
    for misleading in (False, True):
        pair = unit_pair(chain, samples, misleading)
        result = compensate_unit(pair, list(quant_layers(pair.quantized).items()), smooth=False, seed=0)
        is_nearest = torch.equal(pair.quantized(samples), nearest(samples))
        assert is_nearest == misleading
        assert (result.after < result.before) != misleading


def test_smoothing_is_taken_for_outliers_alone():
    torch.manual_seed(0)
    plain = torch.randn(512, 32)
    outliers = plain * torch.where(torch.arange(32) % 16 == 0, 200.0, 1.0)
    layer = nn.Linear(32, 16)
    quantized = QuantLinear(layer, 8, 8, False)
    assert choose_smoothing(quantized, outliers) > 0 and quantized.smoothing is not None
    wide = QuantLinear(layer, 8, 16, False)
    assert choose_smoothing(wide, outliers) == 0  # 16 bits hold the outliers


def test_the_samples_of_the_measurement_are_spread_over_all_time_steps():
    steps = torch.arange(0, 1000, 50).repeat_interleave(30)[torch.randperm(600)]
    data = CalibrationData((torch.randn(600, 2), steps.float()))
    chosen = data.timesteps(_over_time(data, 20)).tolist()
    assert sorted(chosen) == sorted(set(steps.tolist())) != chosen  # a part of them is spread too
    assert len(_over_time(data, 1000)) == 600 == len(set(_over_time(data, 1000).tolist()))
    for second in (torch.randn(600, 7, 2), torch.randn(600, 3)):  # no time step
        assert len(_over_time(CalibrationData((torch.randn(600, 2), second)), 20)) == 20


def test_activations_in_place_do_not_hide_what_a_layer_does():
    torch.manual_seed(0)
    first, second = nn.Linear(8, 32), nn.Linear(32, 8)
    data = CalibrationData((torch.randn(16, 8),))
    found = []
    for inplace in (False, True):
        network = nn.Sequential(first, nn.SiLU(inplace=inplace), second)
        architecture = Architecture("test", make_unet=lambda _, network=network: network, blocks={})
        quant = QuantConfig(weight_bit=4, quant_act=True)
        found.append(measure_sensitivity(network, architecture, quant, data, CPU))
    assert found[0] == found[1]


def test_measured_sensitivity_is_the_error_that_a_layer_makes(chain, samples, capsys):
    quant = QuantConfig(weight_bit=4, quant_act=True)
    architecture = Architecture("test", make_unet=lambda _: chain, blocks={})
    data = CalibrationData((samples,))
    found = measure_sensitivity(chain, architecture, quant, data, CPU)
    target = chain(samples).detach()
    for path in found:
        network = wrapped(chain, weight_bit=4)
        layer = network.get_submodule(path)
        layer.init_weight_scales("least_squares")
        error = (network(samples) - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
        measured = math.sqrt(found[path].of_weight)
        assert 0.5 < measured / error.square().mean().sqrt().item() < 2, path
    shown = capsys.readouterr().err  # the progress bar
    assert "sensitivity: 100%" in shown and f"{min(SAMPLES, len(samples))}/{min(SAMPLES, len(samples))} [" in shown


def sensitivities():
    return {
        "small": Sensitivity(of_input=1e-2, of_weight=1e-1, macs=10, elements=10),
        "large": Sensitivity(of_input=1e-4, of_weight=1e-3, macs=900, elements=900),
        "matmul": Sensitivity(of_input=1e-6, macs=90),
    }


def test_the_policy_gives_bits_where_they_help_most_and_stays_in_its_budget():
    quant = QuantConfig(weight_bit=8, quant_act=True)
    assert dict(choose_policy(sensitivities(), quant, 0.05)) == {"small": "W8A16"}
    assert dict(choose_policy(sensitivities(), quant, 0.005)) == {"small": "W8A12"}, "half the cost of 16 bits"
    assert choose_policy(sensitivities(), quant, 0.002) == ()
    four = dict(choose_policy(sensitivities(), replace(quant, weight_bit=4), 0.05))
    assert four["small"] == "W8A16"
    weights_only = dict(choose_policy(sensitivities(), QuantConfig(weight_bit=4), 0.02))
    assert weights_only["small"] == "W8"


def test_what_the_caller_said_of_a_layer_stays():
    quant = QuantConfig(weight_bit=8, quant_act=True, policy=(("small", "keep"),))
    assert "small" not in dict(choose_policy(sensitivities(), quant, 0.05))
    quant = replace(quant, policy=(("small", "W8A10"),))
    assert "small" not in dict(choose_policy(sensitivities(), quant, 0.05))


def test_one_signed_channels_get_ranges_that_include_zero():
    values = torch.tensor([[1.0, 1.2, 1.5], [-0.3, -0.2, -0.4]])
    scale, zero = choose_qparams(values, 8, channel_wise=True, method="least_squares")
    q = torch.clamp((values / scale).round() + zero, 0, 255)
    assert torch.allclose((q - zero) * scale, values, atol=0.01)
    alone, _ = choose_qparams(torch.tensor([[3e-9]]), 4, channel_wise=True, method="least_squares")
    assert torch.allclose(alone, torch.tensor([[2e-10]]), rtol=0.3)  # no absolute floor


def test_each_mode_has_its_own_biases(chain, samples, tmp_path):
    network = qdiff.quantize(
        chain, (samples,), weight_bit=4, preset="fast", **SMALL | {"iters_tune": 20, "iters_tune_a": 20}
    )
    with_activations = mode_parameters(network, True)
    assert set(with_activations) == set(mode_parameters(network, False)) and with_activations
    on = network(samples)
    enable_activations(network, False)
    off = network(samples)
    assert not torch.equal(on, off)
    qdiff.save(tmp_path / "q.safetensors", network)
    again = qdiff.load(tmp_path / "q.safetensors", model=chain, device="cpu", engine="simulated")
    assert torch.equal(again(samples), on)
    enable_activations(again, False)
    assert torch.equal(again(samples), off)


def test_finetuning_lowers_the_error_and_keeps_integers_in_range(chain, samples):
    network = wrapped(chain, weight_bit=4)
    init_weights(network, "least_squares")
    data = CalibrationData((samples,), num_train=32)
    config = CalibrationConfig(iters_tune=60, batch_tune=16)
    result = FineTuner(chain, network, data, config, weights=True).run(lambda _: None)
    assert result.after < 0.9 * result.before
    for layer in quant_layers(network).values():
        assert layer.quantized and int(layer.weight_quantizer.integers.max()) <= 15
    assert not any(quantizer.enabled for quantizer in act_quantizers(network).values())


def test_presets_share_their_methods_and_published_is_the_papers():
    fast, best = PRESETS["fast"], PRESETS["best"]
    for name in ("rounding", "smoothing", "policy_budget"):
        assert getattr(fast, name) == getattr(best, name)
    assert best.iters_tune > fast.iters_tune and best.unit_samples > fast.unit_samples
    assert PRESETS["published"] == CalibrationConfig()
    assert (CalibrationConfig().rounding, CalibrationConfig().iters_tune) == ("adaround", 0)


def test_a_network_of_one_linear_layer_with_one_input():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 4)

        def forward(self, x):
            return F.relu(self.layer(x))

    torch.manual_seed(0)
    network, x = One().eval(), torch.linspace(0, 1, 64)[:, None]
    quantized = qdiff.quantize(network, (x,), preset="fast", **SMALL)
    target = network(x).detach()
    assert (quantized(x) - target).norm() / target.norm() < 0.02
