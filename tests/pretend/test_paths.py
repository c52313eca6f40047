"""Every path on a pretended CUDA device: it runs, mixes no devices, and gives the numbers of the CPU.

`tests/unit/test_pretended_cuda.py` runs these tests in a process of their own.
"""

import copy
import logging
import os
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddim.family import PIXEL
from ddim.sampling import PixelSampler, PixelSamplerConfig
from ldm.checkpoint import open_checkpoint
from ldm.conditions import class_conditions, text_conditions
from ldm.config import load_config
from ldm.samplers import LatentSamplerConfig
from ldm.sampling import LatentSampler
from ldm.unet import timestep_embedding
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.ranges import timestep_group_bounds
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.cuda import halve_weights
from qdiff.engines.gpu import card
from qdiff.engines.select import apply_engine
from tests.support import golden, tiny, tiny_latent
from tests.support.engines import network_of

if "QDIFF_PRETENDED_CUDA" not in os.environ:
    pytest.skip("needs a process of its own: tests/unit/test_pretended_cuda.py", allow_module_level=True)

from tests.pretend.device import CUDA, pretended_cuda

QUANT = QuantConfig(weight_bit=4, quant_act=True, split=True)
LINEAR = QUANT.linear()
SHORT = CalibrationConfig(
    batch_size=4, rounding="adaround", iters=1, iters_a=1, iters_tune=1, iters_tune_a=1, batch_tune=4
)


# of the reconstructions, whose operators are counted by the 100,000: one resolution, with attention
ONE_RESOLUTION = {
    "pixel": {"ch_mult": (1,), "attn_resolutions": (8,)},
    "none": {"channel_mult": (1,), "attention_resolutions": (1,)},
    "text": {"channel_mult": (1,), "attention_resolutions": (1,)},
}


@pytest.fixture
def counts():
    with pretended_cuda() as counts:
        yield counts


class Case:
    """A tiny network with its nearest rounding, made on the CPU; `copies` may be moved."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.network, self.architecture, self.rows = network_of(kind, folder)
        self.simulated = self.quantized(LINEAR)

    def quantized(self, quant: QuantConfig) -> nn.Module:
        """The network by nearest rounding."""
        return Calibration(self.network, self.architecture, quant, CalibrationConfig(), self.rows).run()

    def copies(self) -> tuple[nn.Module, nn.Module]:
        """The network and its quantized form."""
        return copy.deepcopy(self.network), copy.deepcopy(self.simulated)


@pytest.fixture(scope="module", params=["pixel", "none", "text"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("case"))


def moved(inputs) -> tuple[Tensor, ...]:
    return tuple(part.to(CUDA) for part in inputs)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.is_cuda
    assert golden.relative_error(found.cpu().float(), expected) <= tolerance


@torch.no_grad()
def test_networks_and_engines_are_those_of_the_cpu(case, counts):
    network, simulated = case.copies()
    inputs = tuple(part[:4] for part in case.rows.inputs)
    expected, quantized = network(*inputs), simulated(*inputs)
    network, simulated = network.to(CUDA), simulated.to(CUDA)
    near(network(*moved(inputs)), expected, 0.0)
    near(apply_engine(network)(*moved(inputs)), expected, 1e-5)
    near(simulated(*moved(inputs)), quantized, 0.0)
    near(apply_engine(simulated)(*moved(inputs)), quantized, 0.05)
    with torch.autocast("cuda", torch.float16):
        near(apply_engine(simulated)(*moved(inputs)), quantized, 0.3)


class Eager:
    """A recording without a CUDA graph: the pass runs when it is recorded, and is not run again."""

    def __init__(self, run, inputs, pool):
        self.outputs = run(inputs)

    def __call__(self, inputs):
        return self.outputs


@torch.no_grad()
def test_integers_are_multiplied_without_waiting(tmp_path, counts, monkeypatch):
    pytest.importorskip("triton", reason="the package triton is not installed")
    from qdiff.engines.gpu import graphs

    network, architecture, rows = network_of("text", tmp_path, **ONE_RESOLUTION["text"])
    rows = replace(rows, inputs=(rows.inputs[0][..., :4, :4], *rows.inputs[1:]))
    inputs = tuple(part[:1] for part in rows.inputs)
    simulated = Calibration(network, architecture, LINEAR, CalibrationConfig(), rows).run()
    quantized = simulated(*inputs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))  # where int8 is expected to be faster
    monkeypatch.setattr(card, "why_wrong", lambda _: None)
    monkeypatch.setattr(graphs, "Recording", Eager)
    prepared = apply_engine(simulated.to(CUDA))
    assert isinstance(prepared, graphs.GraphedNetwork)
    inputs = moved(inputs)
    timestep_embedding(inputs[1], network.config.model_channels)  # copies the frequencies once
    counts.reset()
    found = prepared(*inputs)
    assert not counts.waits and not counts.formats  # no convolution but ours
    assert counts.launches["int8_product"] > 40 and counts.launches["int8_attention"] > 4
    near(found, quantized, 0.05)


@torch.no_grad()
def test_prepared_networks_stay_in_channels_last_memory(case, counts):
    network, simulated = case.copies()
    inputs = moved(part[:4] for part in case.rows.inputs)
    for prepared in (apply_engine(simulated.to(CUDA)), apply_engine(network.to(CUDA))):
        counts.reset()
        with torch.autocast("cuda", torch.float16):
            prepared(*inputs)
        assert counts.formats["channels_last"] > 10 and not counts.formats["contiguous"]


@torch.no_grad()
def test_fused_attention_gets_memory_that_its_fast_forms_take(case, counts, monkeypatch):
    network, _ = case.copies()
    strides = []
    original = nn.functional.scaled_dot_product_attention

    def attention(q, k, v, **settings):
        strides.extend(part.stride(-1) for part in (q, k, v))
        return original(q, k, v, **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    apply_engine(network.to(CUDA))(*moved(part[:4] for part in case.rows.inputs))
    assert strides and set(strides) == {1}


@torch.no_grad()
@pytest.mark.parametrize("case", ["text"], indirect=True)
def test_half_weights_are_those_of_autocast(case, counts):
    network, _ = case.copies()
    inputs = moved(part[:4] for part in case.rows.inputs)
    network = apply_engine(network.to(CUDA))
    with torch.autocast("cuda", torch.float16):
        counts.reset()
        expected = network(*inputs)
        before = counts.launches.total()
        halve_weights(network, torch.float16)
        counts.reset()
        found = network(*inputs)
    assert torch.equal(found.cpu(), expected.cpu())
    assert counts.launches.total() <= before - 30  # the weights are not turned into float16 in every forward pass


def few(rows: CalibrationData) -> CalibrationData:
    """An eighth of the samples."""
    trajectories = None if rows.trajectories is None else rows.trajectories[::8]
    return replace(rows, inputs=tuple(part[::8] for part in rows.inputs), trajectories=trajectories)


def validation_losses(messages: list[str]) -> tuple[list[float], list[float]]:
    """The losses before and after each step of a calibration, from the log: those of weights, and the others."""
    pattern = r"(?P<step>.*): validation loss (?P<before>\S+) -> (?P<after>\S+),"
    losses: tuple[list[float], list[float]] = ([], [])
    for found in filter(None, (re.match(pattern, message) for message in messages)):
        losses["weights" not in found["step"]].extend([float(found["before"]), float(found["after"])])
    return losses


def calibrated(kind: str, folder, quant: QuantConfig, on_cuda: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    network, architecture, rows = network_of(kind, folder, **ONE_RESOLUTION[kind])
    if quant.time_bounds:
        quant = replace(quant, time_bounds=timestep_group_bounds(rows, 3))
    network = network.to(CUDA) if on_cuda else network
    quantized = Calibration(network, architecture, quant, SHORT, few(rows)).run()
    return quantized, tuple(part[:4] for part in rows.inputs)


@pytest.mark.parametrize(
    ("kind", "quant"),
    [
        ("pixel", replace(QUANT, time_bounds=(1.0,))),
        pytest.param("none", QUANT, marks=pytest.mark.slow),
        pytest.param("text", replace(QUANT, time_bounds=(1.0,)), marks=pytest.mark.slow),
    ],
)
def test_every_phase_of_a_reconstruction_is_that_of_the_cpu(tmp_path, caplog, kind, quant):
    """The losses of steps on weights, their integers and scales; few roundings flip. Activations run to the end."""
    caplog.set_level(logging.INFO)
    expected, _ = calibrated(kind, tmp_path / "cpu", quant, on_cuda=False)
    expected_weights, expected_activations = validation_losses(caplog.messages)
    caplog.clear()
    with pretended_cuda():
        found, inputs = calibrated(kind, tmp_path / "cuda", quant, on_cuda=True)
        with torch.no_grad():
            near(apply_engine(found)(*moved(inputs)), found(*moved(inputs)).cpu(), 0.05)
        state = found.state_dict()
        assert all(tensor.is_cuda for tensor in state.values())
        state = {name: tensor.cpu() for name, tensor in state.items()}
    weights, activations = validation_losses(caplog.messages)
    assert len(weights) > 20 and weights == pytest.approx(expected_weights, rel=2e-3)
    # Activations on the edge between two integers flip, and each flip changes all inputs behind it. So of the phases
    # with activations only the first unit is compared.
    assert len(activations) == len(expected_activations) > 20
    assert activations[0] == pytest.approx(expected_activations[0], rel=2e-3)
    for name, tensor in expected.state_dict().items():
        other = state[name]
        assert torch.isfinite(other).all(), name
        if tensor.dtype == torch.uint8:
            assert (tensor != other).float().mean() < 0.01, name
        elif name.endswith("delta") and "weight_quantizer" in name:
            assert golden.relative_error(other, tensor) < 0.03, name


def test_an_iteration_of_a_reconstruction_waits_for_nothing(counts):
    """Neither reading the samples nor the loss makes the CPU wait for the GPU, nor does a scale on the CPU."""
    model = replace(tiny.MODEL, **ONE_RESOLUTION["pixel"])
    rows = tiny.rows(tiny.unet(config=model))
    weights_only, waits = replace(QUANT, quant_act=False, weight_scale_method="max"), {}
    for iterations in (2, 4):  # the first loss is read, and the last ones at the end
        counts.reset()
        recipe = replace(SHORT, iters=iterations, iters_tune=0, iters_tune_a=0, iters_a=0)
        Calibration(tiny.unet(config=model).to(CUDA), PIXEL, weights_only, recipe, few(rows)).run()
        waits[iterations] = counts.waits.total()
    assert waits[4] == waits[2]


@pytest.mark.parametrize("kind", ["generalized", "ddpm_noisy", "dpm_solver"])
def test_pixel_samplers_are_those_of_the_cpu(counts, kind):
    cpu = tiny.sampler()
    network = tiny.unet()
    settings = PixelSamplerConfig(kind, "quad", 4, eta=1.0 if kind == "generalized" else 0.0)
    expected = PixelSampler(cpu.config, settings, torch.device("cpu"))(network, range(2), 1)
    network = network.to(CUDA)
    near(PixelSampler(cpu.config, settings, CUDA)(network, range(2), 1), expected, 1e-6)


SAMPLED = [("text", "ddim"), ("text", "plms"), ("class", "vanilla"), ("none", "dpm")]  # each kind, each sampler
SLOW_SAMPLED = [
    pytest.param(*pair, marks=pytest.mark.slow)
    for pair in product(("none", "class", "text"), ("ddim", "plms", "dpm", "vanilla"))
    if pair not in SAMPLED
]


@pytest.mark.parametrize(("kind", "sampler"), [*SAMPLED, *SLOW_SAMPLED])
def test_latent_samplers_are_those_of_the_cpu(tmp_path, counts, kind, sampler):
    folder = tiny_latent.model_folder(tmp_path / kind, kind)
    config = load_config(folder / "config.yaml")
    config = replace(config, timesteps=6) if sampler == "vanilla" else config
    checkpoint = open_checkpoint(folder, config)
    settings = LatentSamplerConfig(sampler, 4, 0.0, 1.0 if kind == "none" else 3.0)
    images = []
    for device in (torch.device("cpu"), CUDA):
        parts = checkpoint.model_parts().to(device)
        conditions = None
        if kind == "text":
            conditions = text_conditions(lambda parts=parts: parts, lambda index: "red heart")
        elif kind == "class":
            conditions = class_conditions(lambda parts=parts: parts, [0, 1, 2])
        sample = LatentSampler(config, settings, device, None, conditions)
        images.append(parts.decode(sample(checkpoint.unet().to(device), range(2), 1)))
    near(images[1], images[0], 1e-5)


STEP_WAITS = {"full": 0, "quantized": 0, "groups": 1}  # a step with timestep groups reads which group comes


@torch.no_grad()
@pytest.mark.parametrize("case", ["pixel", "text"], indirect=True)
@pytest.mark.parametrize("form", list(STEP_WAITS))
def test_a_sampling_step_makes_the_cpu_wait_no_more_than_before(case, form):
    network, simulated = case.copies()
    if form == "quantized":
        network = simulated
    elif form == "groups":
        network = case.quantized(replace(LINEAR, time_bounds=timestep_group_bounds(case.rows, 3)))
    with pretended_cuda() as counts:
        inputs = moved(part[:2] for part in case.rows.inputs)
        inputs = (inputs[0], inputs[1][:1].expand(2).contiguous(), *inputs[2:])
        network = apply_engine(network.to(CUDA))
        network(*inputs)
        counts.reset()
        network(*inputs)
    assert counts.waits.total() == STEP_WAITS[form], counts.waits


LAUNCHES = {"pixel": 978, "none": 862, "text": 1546}  # of one forward pass on packed weights, as counted


@torch.no_grad()
def test_a_forward_pass_on_packed_weights_keeps_to_its_launches(case, counts):
    inputs = moved(part[:2] for part in case.rows.inputs)
    packed = apply_engine(case.copies()[1].to(CUDA), "auto")
    packed(*inputs)
    counts.reset()
    packed(*inputs)
    assert counts.launches.total() <= LAUNCHES[case.kind] + 5, counts.launches
