"""The choice of the integer engine on CUDA, recorded passes, and the check of a card, without a card."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qdiff.engines.gpu import card
from qdiff.engines.select import apply_engine, on_gpu
from qdiff.errors import ConfigError
from qdiff.layers import QuantConv2d, QuantLinear, TimestepGroups
from qdiff.model import set_timesteps
from tests.support.engines import quantized_layer

pytest.importorskip("triton", reason="the package triton is not installed")

from qdiff.engines.gpu import graphs, launches, layers

CPU = torch.device("cpu")
X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A quantized convolution and a quantized linear map, called with a time step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = quantized_layer(nn.Conv2d(8, 8, 3, padding=1), QuantConv2d, 4, False, "max", X)
        self.linear = quantized_layer(nn.Linear(8, 4), QuantLinear, 4, False, "max", X.mean((2, 3)) * 2)

    def forward(self, x, t):
        return self.linear(self.conv(x).mean((2, 3)) + t[:, None])


@pytest.fixture
def pretended(monkeypatch):
    """What is asked of a card; tests change the answers."""
    answers = SimpleNamespace(unavailable=None, faster=True, wrong=None)
    monkeypatch.setattr(card, "why_unavailable", lambda _: answers.unavailable)
    monkeypatch.setattr(card, "expected_faster", lambda _: answers.faster)
    monkeypatch.setattr(card, "why_wrong", lambda _: answers.wrong)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    return answers


class Recorded:
    """A recording that runs the pass again; `made` counts the recordings."""

    made = 0

    def __init__(self, run, inputs, pool):
        Recorded.made += 1
        self.run = run
        run(inputs)

    def __call__(self, inputs):
        return self.run(inputs)


@pytest.fixture
def recorded(monkeypatch):
    Recorded.made = 0
    monkeypatch.setattr(graphs, "Recording", Recorded)


def test_integers_are_chosen_by_the_card_and_the_log_says_so(pretended, caplog):
    caplog.set_level(logging.INFO)
    assert isinstance(on_gpu(Network(), "auto", CPU), graphs.GraphedNetwork)
    assert caplog.messages == ["engine: integer (2 of 2 layers and attentions) for a card, not measured on this card"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"unavailable": "int8 kernels need compute capability 8.0, this card has 7.5"}, "this card has 7.5"),
        ({"faster": False}, "int8 is not expected to be faster on a card"),
        ({"wrong": "the int8 kernels give wrong numbers on a card"}, "wrong numbers on a card"),
    ],
)
def test_what_speaks_against_integers(pretended, caplog, answer, message):
    caplog.set_level(logging.INFO)
    vars(pretended).update(answer)
    network = on_gpu(Network(), "auto", CPU)
    assert not isinstance(network, graphs.GraphedNetwork)
    (line,) = caplog.messages
    assert line.startswith("engine: packed weights") and message in line
    if "faster" in answer:
        assert isinstance(on_gpu(Network(), "integer", CPU), graphs.GraphedNetwork)
    else:
        with pytest.raises(ConfigError, match=message):
            on_gpu(Network(), "integer", CPU)


def test_networks_without_a_layer_for_integers_are_refused(pretended):
    network = Network()
    for layer in (network.conv, network.linear):
        layer.act_quantizer.enabled = False
    with pytest.raises(ConfigError, match=r"no layer has a form .*conv, linear \(activations that are not quantized\)"):
        on_gpu(network, "integer", CPU)
    with pytest.raises(ConfigError, match="the network is not quantized"):
        on_gpu(nn.Conv2d(3, 3, 1), "integer", CPU)


def test_weights_stay_packed_on_request_alone(pretended, caplog):
    caplog.set_level(logging.INFO)
    for engine, packed in (("integer", False), ("integer_packed", True)):
        network = on_gpu(Network(), engine, CPU).network
        assert [layer.parts[0].nibble_zero is not None for layer in (network.conv, network.linear)] == [packed] * 2
        assert ("; weights of 2 layers stay packed" in caplog.text) == packed
    with pytest.raises(ConfigError, match="integer_packed: it is for CUDA, found cpu"):
        apply_engine(Network(), "integer_packed")


@torch.no_grad()
def test_a_pass_is_recorded_once_for_each_shape(recorded):
    network = Network()
    expected = network(X, torch.ones(2))
    found = graphs.GraphedNetwork(layers.to_integer(network))
    for _ in range(2):
        assert torch.allclose(found(X, torch.ones(2)), expected, atol=1e-5)
    found(X[:1], torch.ones(1))
    found(X[:1], t=torch.ones(1))
    assert Recorded.made == 3 and not found.fails
    assert apply_engine(found) is found


@torch.no_grad()
def test_only_so_many_shapes_are_recorded(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    found = graphs.GraphedNetwork(layers.to_integer(Network()))
    first, second = found(X, torch.ones(2)), found(X[:1], torch.ones(1))
    assert Recorded.made == 1 and len(first) == 2 and len(second) == 1


@torch.no_grad()
def test_modes_are_recorded_apart(recorded):
    network = Network()
    found = graphs.GraphedNetwork(layers.to_integer(network))
    with_activations = found(X, torch.ones(2))
    for quantizer in found.quantizers:
        quantizer.enabled = False
    for layer in (network.conv, network.linear):
        layer.act_quantizer.enabled = False
    without = found(X, torch.ones(2))
    assert Recorded.made == 2 and not torch.equal(with_activations, without)
    assert torch.allclose(without, network(X, torch.ones(2)), atol=1e-5)


@torch.no_grad()
def test_what_cannot_be_recorded_runs_eagerly(monkeypatch, caplog):
    def fails(run, inputs, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "Recording", fails)
    network = Network()
    found = graphs.GraphedNetwork(layers.to_integer(network))
    for _ in range(2):
        assert torch.allclose(found(X, torch.ones(2)), network(X, torch.ones(2)), atol=1e-5)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["engine: no CUDA graphs (operation not permitted when stream is capturing)"]


@torch.no_grad()
@pytest.mark.parametrize("place", ["", "linear"])
def test_hooks_are_not_lost(recorded, place):
    network = Network()
    calls = []
    if place:
        network.linear.register_forward_hook(lambda *_: calls.append(1))
    found = graphs.GraphedNetwork(layers.to_integer(network))
    if not place:
        found.network.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        found(X, torch.ones(2))
    assert calls == [1, 1] and Recorded.made == 0


def grouped() -> Network:
    """A network of two timestep groups."""
    network = Network()
    groups = TimestepGroups([500.0])
    network.timestep_groups = groups
    for layer in (network.conv, network.linear):
        act = layer.act_quantizer
        act.groups = groups
        act.scale, act.zero_point = act.scale * torch.tensor([1.0, 1.5]), act.zero_point.expand(2).clone()
    network.register_forward_pre_hook(set_timesteps, with_kwargs=True)
    return network


@torch.no_grad()
@pytest.mark.parametrize("simulated", [False, True])
def test_timestep_groups_change_without_a_new_recording(recorded, simulated):
    """A layer that stays simulated chooses its scales on the CPU, so each group is recorded."""
    network = grouped()
    if simulated:
        network.linear.weight_quantizer.zero_point += 0.5
        network.linear.freeze()
    found = graphs.GraphedNetwork(layers.to_integer(network))
    results = []
    for t in (0.0, 900.0):
        times = torch.full((2,), t)
        results.append(found(X, times))
        assert torch.allclose(results[-1], network(X, times), rtol=1e-5, atol=1e-4)
    assert torch.equal(found(X, torch.zeros(2)), results[0])
    made = 2 if simulated else 1
    assert Recorded.made == made and not torch.equal(*results)
    mixed = torch.tensor([0.0, 900.0])  # each sample has its own scale: simulated, and not recorded
    assert torch.allclose(found(X, mixed), network(X, mixed), rtol=1e-5, atol=1e-4) and Recorded.made == made


def test_the_check_of_a_card_finds_wrong_numbers(monkeypatch):
    monkeypatch.setattr(card, "SHAPES", [shape for shape in card.SHAPES if shape[3] in (96, 2560)])
    assert card.products_are_exact(CPU) and card.functions_are_near(CPU)
    for name, check in (("product", card.products_are_exact), ("attention", card.functions_are_near)):
        right = getattr(launches, name)
        monkeypatch.setattr(launches, name, lambda *args, right=right, **named: right(*args, **named) + 1)
        assert not check(CPU)
    monkeypatch.undo()
    right = launches.quantize
    monkeypatch.setattr(launches, "quantize", lambda *args, **named: [q + 2 for q in right(*args, **named)])
    assert not card.functions_are_near(CPU)


def test_the_check_of_a_card_is_remembered(monkeypatch, tmp_path, caplog):
    asked, device = [], torch.device("cuda", 0)

    def check(found):
        asked.append(found)
        if len(asked) == 1:
            raise RuntimeError("Failed to find C compiler\nmore")
        return len(asked) == 2

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(card, "products_are_exact", check)
    monkeypatch.setattr(card, "functions_are_near", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))

    def ask():
        card._check.cache_clear()
        return card.why_wrong(device)

    assert ask() == "the int8 kernels do not run on a card (Failed to find C compiler)"  # which may be installed
    assert ask() is None and ask() is None and len(asked) == 2
    (record,) = (tmp_path / "qdiff").glob("int8-*.json")
    assert json.loads(record.read_text()) == {"exact": True}
    record.write_text("damaged")
    assert ask() == ask() == "the int8 kernels give wrong numbers on a card" and len(asked) == 3
    card._check.cache_clear()


def test_old_cards_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert card.why_unavailable(CPU) == "int8 kernels need compute capability 8.0, this card has 7.5"
    assert not card.expected_faster(CPU)
    for capability, faster in (((8, 0), True), ((8, 6), True), ((8, 9), True), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert card.why_unavailable(CPU) is None and card.expected_faster(CPU) is faster
