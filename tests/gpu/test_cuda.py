"""The tiny network on a CUDA device: sampling, the packed engine, a calibration. `python -m pytest -m gpu`."""

import pytest
import torch

from ddim.family import PIXEL
from ddim.sampling import PixelSampler, PixelSamplerConfig
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.select import apply_engine
from tests.support import golden, tiny
from tests.support.engines import network_of_policy

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CUDA = torch.device("cuda")
W4A8 = QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True)


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 has 10 bits of mantissa: off while results are compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_images_are_those_of_the_cpu(network):
    cpu = tiny.sampler(5)
    gpu = PixelSampler(cpu.config, PixelSamplerConfig(skip_type="quad", timesteps=5), CUDA)
    expected = cpu(network, range(3), 0)
    found = gpu(tiny.unet().to(CUDA), range(3), 0)
    assert found.is_cuda and golden.relative_error(found.cpu(), expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto", "integer"])
def test_the_packed_engine_is_the_simulation(rows, engine):
    network = tiny.unet()
    simulated = (
        Calibration(network, PIXEL, QuantConfig(**W4A8.to_dict() | {"quant_mode": "linear"}), CalibrationConfig(), rows)
        .run()
        .to(CUDA)
    )
    inputs = tuple(part[::8].to(CUDA) for part in rows.inputs)
    expected = simulated(*inputs)
    found = apply_engine(simulated, engine)(*inputs)
    assert golden.relative_error(found.cpu(), expected.cpu()) < 0.05  # values on the edge between two integers


@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto", "integer"])
def test_policies_and_smoothing_are_those_of_the_simulation(engine):
    policy = (("conv_in", "W8A16"), ("conv_out", "keep"), ("mid.*.conv1", "W6A12"))
    simulated, rows, _ = network_of_policy(policy)
    simulated = simulated.to(CUDA)
    inputs = tuple(part[::8].to(CUDA) for part in rows.inputs)
    expected = simulated(*inputs)
    found = apply_engine(simulated, engine)(*inputs)
    assert golden.relative_error(found.cpu(), expected.cpu()) < 0.05  # values on the edge between two integers


def test_a_calibration_beats_nearest_rounding(rows):
    network = tiny.unet().to(CUDA)
    recipe = CalibrationConfig(num_timesteps=4, samples=16, batch_size=16, iters=120, lr=3e-2, iters_a=0)
    weights = QuantConfig(weight_bit=4, split=True)
    inputs = tuple(part.to(CUDA) for part in rows.inputs)
    errors = []
    for mode in ("linear", "qdiff"):
        quantized = Calibration(
            network, PIXEL, QuantConfig(**weights.to_dict() | {"quant_mode": mode}), recipe, rows
        ).run()
        with torch.no_grad():
            errors.append(golden.relative_error(quantized(*inputs).cpu(), network(*inputs).cpu()))
    assert errors[1] < errors[0]
