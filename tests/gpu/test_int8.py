"""The integer engine on a card against Triton's interpreter, recorded passes, processes and memory. `make test-gpu`."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ddim.family import PIXEL
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig
from qdiff.engines.cuda import to_packed
from tests.support import golden, tiny
from tests.support.commands import REPOSITORY
from tests.support.engines import LINEAR, network_of_policy

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

import triton

from qdiff.engines.gpu import card, graphs, layers
from tests.support.int8_cases import attention_cases, exact_cases, rounded_cases

CUDA = torch.device("cuda")
if triton.knobs.runtime.interpret:
    pytest.skip("the kernels run in the interpreter: run `pytest -m gpu`", allow_module_level=True)
if (reason := card.why_unavailable(CUDA)) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the interpreter gives for all cases."""
    path = tmp_path_factory.mktemp("int8") / "cases.safetensors"
    command = [sys.executable, "-m", "tests.support.int8_cases", str(path)]
    subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | {"TRITON_INTERPRET": "1"})
    return load_file(path)


def test_products_and_their_epilogues_are_those_of_the_interpreter(interpreted):
    for name, found in exact_cases(CUDA).items():
        assert torch.equal(found.cpu(), interpreted[name]), name


def test_quantized_values_are_at_most_one_step_off(interpreted):
    for name, found in rounded_cases(CUDA).items():
        steps = (found.cpu().int() - interpreted[name].int()).abs()
        assert steps.max() <= 1 and (steps > 0).float().mean() <= 1e-4, name


def test_attentions_are_those_of_the_interpreter(interpreted):
    for name, found in attention_cases(CUDA).items():
        assert golden.relative_error(found.cpu(), interpreted[name]) < 1e-4, name


def test_the_check_of_the_card_passes():
    assert card.products_are_exact(CUDA)


def simulated():
    network = tiny.unet()
    rows = tiny.rows(network)
    quantized = Calibration(network, PIXEL, LINEAR, CalibrationConfig(), rows).run().to(CUDA)
    return quantized, tuple(part[::8].to(CUDA) for part in rows.inputs)


@torch.no_grad()
def test_a_recorded_pass_is_the_eager_one():
    quantized, inputs = simulated()
    network = layers.to_integer(quantized)
    recorded = graphs.GraphedNetwork(layers.to_integer(quantized))
    for scale in (1.0, 0.5):
        x = (inputs[0] * scale, *inputs[1:])
        assert torch.equal(recorded(*x), network(*x))
    assert not recorded.fails and len(recorded.recordings) == 1


@torch.no_grad()
def test_one_recording_serves_all_timestep_groups():
    quantized, rows, _ = network_of_policy((), grouped=True)
    quantized = quantized.to(CUDA)
    network, recorded = layers.to_integer(quantized), graphs.GraphedNetwork(layers.to_integer(quantized))
    x = rows.inputs[0][:2].to(CUDA)
    for t in (0.0, 500.0, 999.0):
        times = torch.full((2,), t, device=CUDA)
        assert torch.equal(recorded(x, times), network(x, times))
    assert not recorded.fails and len(recorded.recordings) == 1


@torch.no_grad()
def digest() -> str:
    """A hash of the results of the tiny network."""
    quantized, inputs = simulated()
    with torch.autocast("cuda", torch.float16):
        found = layers.to_integer(quantized)(*inputs)
    return hashlib.sha256(found.float().cpu().numpy().tobytes()).hexdigest()


def test_two_processes_give_the_same_as_one():
    code = "from tests.gpu.test_int8 import digest; print(digest())"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert run.stdout.split()[-1] == digest()


@torch.no_grad()
def test_memory_of_a_pass():
    """Bytes take less room than the float16 activations of the packed engine."""
    quantized, inputs = simulated()
    peaks = []
    for prepare in (to_packed, layers.to_integer):
        network = prepare(quantized)
        inputs = tuple(part.repeat(16, *[1] * (part.dim() - 1)) for part in inputs) if not peaks else inputs
        with torch.autocast("cuda", torch.float16):
            network(*inputs)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            network(*inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0]
