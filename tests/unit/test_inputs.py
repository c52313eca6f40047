"""Calibration samples in the forms that people's networks take, and outputs that are no single tensor."""

from collections import Counter, OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import qdiff
from qdiff.architecture import Architecture
from qdiff.calibration import ranges
from qdiff.calibration.collate import collate
from qdiff.calls import map_leaves, named_leaves, output_tensor
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import ConfigError
from qdiff.model import act_quantizers, quant_layers, quantize_model
from qdiff.scale_rules import choose_qparams
from tests.support.foreign import INPUTS, QUICK, Denoiser, Residual

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Sample:
    sample: torch.Tensor
    note: str = ""


@dataclass
class ModelOutput(OrderedDict):
    """Dict and dataclass in one, as diffusers returns them."""

    sample: torch.Tensor = None
    extra: tuple = None

    def __post_init__(self):
        for name in ("sample", "extra"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Conditioned(nn.Module):
    """Takes a time step that is a number, a table that all samples share, and a nested condition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.times: list[object] = []

    def forward(self, sample, timestep, added=None, table=None, return_dict=True):
        self.times.append(timestep)
        if isinstance(timestep, torch.Tensor) and timestep.numel() > 1:
            raise ValueError("one time step is expected")
        h = self.stem(sample) + (table + added["text"][0] + float(timestep) / 10)[:, None]
        h = self.head(torch.relu(self.block(torch.relu(h))))
        return Sample(h) if return_dict else (h,)


def recorded_calls(times=(30, 20, 10), sizes=(4, 4, 2), form=lambda t: t):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, generator=generator)
    calls = []
    for t, size in zip(times, sizes, strict=True):
        x, text = torch.randn(size, 4, generator=generator), torch.randn(size, generator=generator)
        calls.append(((x,), {"timestep": form(t), "added": {"text": [text]}, "table": table, "return_dict": False}))
    return calls


FORMS = [float, int, torch.tensor, lambda t: torch.tensor([t])]


@pytest.mark.parametrize("form", FORMS, ids=["float", "int", "scalar tensor", "tensor of one"])
def test_calls_with_one_time_step_are_joined_and_run_group_by_group(form):
    calls, network = recorded_calls(form=form), Conditioned()
    data = collate(calls, network)
    assert len(data) == 10
    assert data.timesteps(slice(None)).tolist() == [30, 30, 30, 30, 20, 20, 20, 20, 10, 10]
    expected = torch.cat([network(*args, **kwargs)[0] for args, kwargs in calls])
    network.times.clear()
    order = torch.tensor([9, 0, 5, 2, 4, 8])
    assert torch.allclose(data.run(network, order, CPU), expected[order], atol=1e-6)
    assert torch.allclose(data.run(network, slice(3, 9), CPU), expected[3:9], atol=1e-6)
    assert [float(t) for t in network.times] == [10, 20, 30] * 2
    assert all(type(found) is type(form(10)) for found in network.times)
    if isinstance(form(10), torch.Tensor):
        assert all(found.shape == form(10).shape and found.dtype == form(10).dtype for found in network.times)


def test_samples_are_split_by_the_runs_of_the_sampler():
    first, second = recorded_calls(sizes=(4, 4, 4)), recorded_calls(sizes=(4, 4, 4))
    for args, _ in second:
        args[0].add_(1)
    for args, _ in first:
        args[0][2:] = args[0][:2]  # the same noise with another condition
    numbers = collate([*first, *second], Conditioned()).trajectories.view(6, 4)
    for rows in (numbers[:3], numbers[3:]):
        assert (rows == rows[0]).all(), "a sample keeps its place in a run"
    assert numbers[0, 0] == numbers[0, 2] and numbers[0, 1] == numbers[0, 3] and len(numbers[0].unique()) == 2
    assert len(numbers[3].unique()) == 4 and not set(numbers[0].tolist()) & set(numbers[3].tolist())


def test_what_has_no_samples_is_shared():
    class Roped(nn.Module):
        def forward(self, x, t, positions, rope, lengths=(2, 3)):
            return x + positions[: x.shape[1], None] + rope[0] + len(lengths) + t[:, None, None]

    x, t, positions, rope = torch.randn(5, 3, 4), torch.rand(5), torch.arange(6), [torch.randn(3, 4)]
    for inputs in (
        (x, t, positions, rope),
        {"x": x, "t": t, "positions": positions, "rope": rope, "lengths": (2, 3)},
        [(x[:2], t[:2], positions, rope), (x[2:], t[2:], positions, rope)],
    ):
        data = collate(inputs, Roped())
        assert len(data) == 5 and len(data.inputs) == 2 and data.x(slice(None)).shape == x.shape
        assert torch.equal(data.run(Roped(), torch.tensor([3, 1]), CPU), Roped()(x, t, positions, rope)[[3, 1]])


def test_a_table_as_long_as_the_batch_is_shared_if_it_is_named():
    class Biased(nn.Module):
        def forward(self, x, bias):
            return x + bias["rows"]

    x, bias = torch.randn(4, 4, 2), {"rows": torch.randn(4, 2)}
    for shared, inputs in (
        (("bias",), {"x": x, "bias": bias}),
        ((1,), (x, bias)),
        (("bias.rows",), {"x": x, "bias": bias}),
    ):
        data = collate(inputs, Biased(), shared)
        assert torch.equal(data.run(Biased(), slice(0, 2), CPU), x[:2] + bias["rows"])
    assert len(collate((x, bias), Biased()).inputs) == 2


X, T = torch.randn(4, 3), torch.arange(4.0)
WRONG = [
    ("inputs", "of type int: expected tensors by position", 3),
    ("inputs", "without a tensor that has the samples first", ()),
    ("inputs", "without a tensor that has the samples first", {"x": 1.0}),
    ("inputs", "of type Tensor: expected tensors by position", X),
    ("inputs", "call 1 differs from the first one in context", [{"x": X, "t": T}, {"x": X, "t": T, "context": X}]),
    ("inputs", r"of \[3, 4\] samples: expected the same number in each", (X, T[:3])),
    ("inputs", r"x is \(4, 3\) in one call and \(4, 2\) in another: expected samples of one shape",
     [{"x": X, "t": T}, {"x": X[:, :2], "t": T}]),
    ("inputs", "mask is full in one call and causal in another",
     [{"x": X, "mask": "full"}, {"x": X, "mask": "causal"}]),
    ("inputs", r"rope is \(7,\) in one call and other values in another",
     [{"x": X, "rope": torch.ones(7)}, {"x": X, "rope": torch.zeros(7)}]),
    ("inputs", "1 holds values that are not finite", (X, T / 0)),
    ("inputs", "context holds values that are not finite", {"x": X, "t": T, "context": X * float("nan")}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "words", "inputs"), WRONG, ids=range(len(WRONG)))
def test_inputs_that_cannot_be_joined_are_named(field, words, inputs):
    with pytest.raises(ConfigError, match=words) as error:
        collate(inputs, nn.Linear(3, 3))
    assert error.value.field == field


def test_a_shared_input_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"^shared: no input ropes, expected one of x, rope"):
        collate({"x": X, "rope": torch.ones(7)}, nn.Linear(3, 3), ["ropes"])


def test_masks_may_hold_infinity():
    assert len(collate((X, T, torch.full((4, 2), -torch.inf)), nn.Linear(3, 3))) == 4


def test_the_hash_knows_every_input():
    calls = recorded_calls()
    hashes = {collate(calls, Conditioned()).hash(), collate(calls[:2], Conditioned()).hash()}
    for name, value in (("table", torch.zeros(1)), ("return_dict", True), ("added", {"text": [torch.zeros(4)]})):
        changed = [(args, kwargs | {name: value if name != "added" else {"text": [torch.zeros(len(args[0]))]}})
                   for args, kwargs in calls]  # fmt: skip
        hashes.add(collate(changed, Conditioned()).hash())
    assert len(hashes) == 5


def test_the_time_step_is_found_by_its_name_or_place():
    class Late(nn.Module):
        def forward(self, x, context, timestep):
            return x

    class Other(nn.Module):
        def forward(self, x, level):
            return x

    assert collate((X, X, T), Late()).spec.time == 2
    assert collate({"context": X, "timestep": T, "x": X}, Late()).spec.time == 1
    assert collate((X, T), Other()).spec.time == 1
    alone = collate((X,), Other())
    with pytest.raises(ConfigError, match=r"^inputs without a time step"):
        alone.timesteps(slice(None))


X2 = torch.ones(2, 3)
OUTPUTS = [
    X2,
    (X2, torch.zeros(2)),
    [torch.tensor([1, 2]), None, {"x": X2}],
    Pair(torch.zeros(3, 2), X2),
    Sample(X2, "note"),
    ModelOutput(sample=X2, extra=(torch.zeros(5),)),
]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_the_first_tensor_with_the_samples_first_is_the_output(output):
    assert output_tensor(output, 2) is X2
    same = map_leaves(lambda leaf: leaf, output)
    assert type(same) is type(output) and [n for n, _ in named_leaves(same)] == [n for n, _ in named_leaves(output)]
    doubled = map_leaves(lambda leaf: leaf * 2 if leaf is X2 else leaf, output)
    assert torch.equal(output_tensor(doubled, 2), 2 * X2) and output_tensor(output, 2) is X2


@pytest.mark.parametrize("groups", [1, 2])
def test_a_network_with_scalar_time_steps_is_quantized_by_one_call(groups):
    torch.manual_seed(0)
    network, calls = Conditioned(), recorded_calls(sizes=(6, 6, 6))
    quantized = qdiff.quantize(network, calls, timestep_groups=groups, **QUICK)
    assert len(quant_layers(quantized)) == 3
    assert all(q.scale.numel() == groups for q in act_quantizers(quantized).values())
    assert len(act_quantizers(quantized)["block.act_quantizer"].scale.unique()) == groups
    args, kwargs = calls[1]
    for return_dict in (True, False):
        found = quantized(*args, **kwargs | {"return_dict": return_dict})
        expected = network(*args, **kwargs | {"return_dict": return_dict})
        assert type(found) is type(expected)
        a, b = output_tensor(found, 6), output_tensor(expected, 6)
        assert 0 < (a - b).norm() < 0.05 * b.norm()


def test_time_steps_that_the_network_takes_for_each_sample_are_given_so():
    class Either(Conditioned):
        def forward(self, sample, timestep, **kwargs):
            self.times.append(timestep)
            t = torch.as_tensor(timestep, dtype=sample.dtype).expand(len(sample))
            return self.head(torch.relu(self.stem(sample))) * t[:, None]

    calls, network = [(x, kwargs["timestep"]) for (x,), kwargs in recorded_calls(form=float)], Either().train()
    data = collate(calls, network)
    assert network.training and network.stem.training
    network.times.clear()
    found = data.run(network, slice(0, 10), CPU)
    assert [tuple(t.shape) for t in network.times] == [(10,)]
    assert torch.allclose(found, torch.cat([network(*call) for call in calls]), atol=1e-5)


def test_inputs_by_keyword_give_what_inputs_by_position_give():
    torch.manual_seed(0)
    network, (x, t) = Denoiser(), INPUTS
    settings = {"blocks": [Residual], "timestep_groups": 2, **QUICK}
    first = qdiff.quantize(network, (x, t), **settings)
    for other in ({"x": x, "t": t}, {"t": t, "x": x}, [((x[:5],), {"t": t[:5]}), ((x[5:],), {"t": t[5:]})]):
        data = collate(other, network)
        assert torch.equal(data.timesteps(slice(None)), t) and torch.equal(data.x(slice(None)), x)
    found = qdiff.quantize(network, {"t": t, "x": x}, **settings)
    assert torch.equal(found(x, t=t), first(x, t)) and torch.equal(found(t=t, x=x), first(x, t))


def test_ranges_of_many_time_steps_see_all_values_and_need_few_searches(monkeypatch):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(1, 4, generator=generator), t, {"text": [torch.zeros(1)]}) for t in torch.rand(32)]
    network = quantize_model(Conditioned(), Architecture("", lambda _: nn.Identity(), {}), QuantConfig(quant_act=True))
    data = collate([((x,), {"timestep": t, "added": a, "table": torch.zeros(1)}) for x, t, a in calls], network)
    searches = Counter()

    def counted(values, *args, name="", **kwargs):
        searches.update([name])
        return choose_qparams(values, *args, name=name, **kwargs)

    monkeypatch.setattr(ranges, "choose_qparams", counted)
    ranges.init_activation_ranges(network, data, "max", CalibrationConfig(), CPU)
    assert len(searches) == 3 and max(searches.values()) < 16
    scale, _ = choose_qparams(torch.cat([x for x, _, _ in calls]), 8, method="max")
    assert network.stem.act_quantizer.scale == scale


def test_nearest_rounding_needs_no_pass_unit_by_unit(monkeypatch, caplog):
    def refuse(*_, **__):
        raise AssertionError("a pass unit by unit")

    monkeypatch.setattr("qdiff.calibration.run.BlockwiseRunner", refuse)
    monkeypatch.setattr("qdiff.calibration.run.Calibration.nearest", refuse)
    quantized = qdiff.quantize(Denoiser(), INPUTS, rounding="nearest", iters_a=0, iters_tune=0, policy_budget=0.0)
    assert all(layer.quantized for layer in quant_layers(quantized).values())
    assert all(q.enabled for q in act_quantizers(quantized).values())
    assert "the report could not be made" not in caplog.text
