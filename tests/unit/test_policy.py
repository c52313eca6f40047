"""Policies (widths per layer, layers in full precision), smoothing, parameters of each mode: in networks and files."""

import pytest
import torch
from torch import nn

import qdiff
from qdiff.architecture import Architecture
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.ranges import init_activation_ranges
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.model import enable_activations, quant_layers, quantize_model, set_mode_parameters
from qdiff.policy import make_policy, widths_of

pytestmark = pytest.mark.unit
ARCHITECTURE = Architecture("test", make_unet=lambda _: Network(), blocks={})


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x, t):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x) + t[:, None, None, None]))))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.linspace(0, 1, 16)


def test_the_last_pattern_with_a_say_counts():
    policy = make_policy({"*": "A8", "first": "W8", "f*": "A16"})
    assert widths_of(policy, "first") == (8, 16)
    assert widths_of(policy, "last") == (None, 8)


@pytest.mark.parametrize("entry", [("a", "W1"), ("a", "17"), ("a", ""), ("", "W4"), ("a", "W4A99"), ("a", "A8W4")])
def test_bad_entries_are_refused(entry):
    with pytest.raises(ConfigError, match="expected"):
        make_policy([entry])


def test_a_config_with_a_policy_survives_a_file_and_an_old_one_has_none():
    quant = QuantConfig(policy=(("first", "A16"),))
    assert QuantConfig.from_dict(quant.to_dict()) == quant
    assert "policy" not in QuantConfig().to_dict()
    assert QuantConfig.from_dict(QuantConfig().to_dict()) == QuantConfig()


def nearest(network, inputs, **arguments):
    return qdiff.quantize(network, inputs, iters=0, iters_a=0, iters_tune=0, **arguments)


def test_layers_take_the_widths_of_the_policy_and_files_keep_them(network, inputs, tmp_path):
    quantized = nearest(network, inputs, weight_bit=4, policy={"first": "W8A16", "last": "keep"})
    first, middle = quant_layers(quantized).values()
    assert (first.weight_quantizer.n_bits, first.act_quantizer.n_bits) == (8, 16)
    assert (middle.weight_quantizer.n_bits, middle.act_quantizer.n_bits) == (4, 8)
    assert type(quantized.last) is nn.Conv2d
    qdiff.save(tmp_path / "q.safetensors", quantized)
    again = qdiff.load(tmp_path / "q.safetensors", model=network, device="cpu", engine="simulated")
    assert torch.equal(again(*inputs), quantized(*inputs))


def test_a_policy_that_names_nothing_is_refused(network, inputs):
    with pytest.raises(ConfigError, match="'frist'"):
        nearest(network, inputs, policy={"frist": "W8"})


def test_smoothing_moves_a_factor_from_the_input_to_the_weight(network):
    wrapped = quantize_model(network, ARCHITECTURE, QuantConfig())
    x = torch.randn(2, 8, 4, 4)
    wrapped.middle.smooth(torch.linspace(0.5, 2, 8))
    assert torch.allclose(wrapped.middle(x), network.middle(x), atol=1e-6)
    assert not torch.equal(wrapped.middle.weight, network.middle.weight)
    assert torch.equal(wrapped.middle.quantize_input(x), x / torch.linspace(0.5, 2, 8).view(1, 8, 1, 1))
    with pytest.raises(ValueError, match="3 factors"):
        wrapped.middle.smooth(torch.ones(3))


def test_smoothing_and_parameters_of_modes_survive_a_file(network, inputs, tmp_path):
    quantized = nearest(network, inputs)
    layer = quant_layers(quantized)["middle"]
    layer.weight, layer.quantized = network.middle.weight.detach(), False
    layer.smooth(torch.linspace(0.5, 2, 8))
    layer.init_weight_scales("mse")
    init_activation_ranges(quantized, CalibrationData(inputs), "mse", CalibrationConfig(), torch.device("cpu"))
    set_mode_parameters(quantized, {"middle.bias": torch.full((8,), 0.25)})
    qdiff.save(tmp_path / "q.safetensors", quantized)
    again = qdiff.load(tmp_path / "q.safetensors", model=network, device="cpu", engine="simulated")
    assert torch.equal(again(*inputs), quantized(*inputs))
    for one in (again, quantized):
        enable_activations(one, False)
    assert torch.equal(again.middle.bias, torch.full((8,), 0.25))
    assert torch.equal(again(*inputs), quantized(*inputs))


def test_a_foreign_weights_only_tensor_is_refused(network, inputs, tmp_path):
    quantized = nearest(network, inputs)
    set_mode_parameters(quantized, {"middle.bias": torch.zeros(5)})
    qdiff.save(tmp_path / "q.safetensors", quantized)
    with pytest.raises(CheckpointError, match="weights_only"):
        qdiff.load(tmp_path / "q.safetensors", model=network)
