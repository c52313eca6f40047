"""Peak memory of a calibration on CUDA, counted on a pretended device: tiny networks, and Stable Diffusion by sizes.

Resident are the full-precision weights, what is quantized of them (integers and their dequantized form), gradients and
the optimizer. Workspaces of libraries are not counted.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ldm import attention
from ldm.config import load_config
from ldm.family import LATENT
from ldm.unet import UNetModel, unet_config
from qdiff import scale_rules
from qdiff.calibration import compensation, finetune, sensitivity, smoothing
from qdiff.calibration.batches import add_gradients
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.finetune import FineTuner
from qdiff.calibration.reconstruct import UnitData, reconstruct_activations, reconstruct_weights
from qdiff.calibration.rounding import UnitPair, compensate_unit
from qdiff.config import PRESETS, QuantConfig
from qdiff.layers import QuantLayer
from qdiff.model import enable_activations, init_weights, quantize_model, unit_modules, units
from tests.support import tiny_latent
from tests.support.commands import REPOSITORY

if "QDIFF_PRETENDED_CUDA" not in os.environ:
    pytest.skip("needs a process of its own: tests/unit/test_pretended_cuda.py", allow_module_level=True)

from tests.pretend.device import CUDA, MEMORY, pretended_cuda

GB = 1e9
BUDGET = 20 * GB  # of a calibration of Stable Diffusion v1
W4A8 = QuantConfig(weight_bit=4, quant_act=True, split=True, sm_abit=16)
PUBLISHED = replace(PRESETS["published"], batch_size=8, iters=2, iters_a=2, running_stat=True)
FAST = replace(PRESETS["fast"], iters_tune=2)


class Bench:
    """A network on the pretended device, without numbers, and its quantized form with integers set."""

    def __init__(self, network: nn.Module, samples: tuple[Tensor, ...]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.data = CalibrationData(samples, num_train=len(samples[0]) - 4)
        self.quantized = quantize_model(self.network, LATENT, W4A8).requires_grad_(False)
        init_weights(self.quantized, "max")
        self.units = units(self.quantized, LATENT)

    def activations_on(self) -> None:
        """Give all activation quantizers a scale."""
        for module in self.quantized.modules():
            if getattr(module, "delta", None) is not None and module.delta.dim() == 0:
                module.delta = torch.ones_like(module.delta)
        enable_activations(self.quantized, True)

    @torch.no_grad()
    def inputs(self, paths: list[str], count: int) -> dict[str, tuple[Tensor, ...]]:
        """The inputs of some units for `count` samples."""
        seen: dict[str, tuple[Tensor, ...]] = {}
        handles = [
            self.quantized.get_submodule(path).register_forward_pre_hook(
                lambda _, args, path=path: seen.update({path: args})
            )
            for path in paths
        ]
        self.data.run(self.quantized, torch.arange(count), CUDA)
        for handle in handles:
            handle.remove()
        return seen

    def runner(self, path: str) -> Callable[[nn.Module, Tensor | slice], Tensor]:
        """Runs a unit on some samples, whose inputs come from the CPU as they do from the cache."""
        inputs = [part.cpu() for part in self.inputs([path], 1)[path]]

        def run(unit: nn.Module, index: Tensor | slice) -> Tensor:
            count = len(range(100)[index]) if isinstance(index, slice) else len(index)
            return unit(*(part.expand(count, *part.shape[1:]).to(CUDA) for part in inputs))

        return run

    def modules(self, path: str) -> dict[str, nn.Module]:
        """The quantized modules of a unit, by their paths in it."""
        return dict(unit_modules(self.quantized.get_submodule(path), LATENT))

    def full_precision(self, path: str) -> list[tuple[str, QuantLayer]]:
        """The layers of a unit with their paths in it, whose weights are in full precision again."""
        layers = [(name, layer) for name, layer in self.modules(path).items() if isinstance(layer, QuantLayer)]
        for name, layer in layers:
            layer.quantized, layer.weight = False, layer.weight_of(self.network.get_submodule(f"{path}.{name}"))
        return layers


def peak_of(work) -> float:
    """The most bytes on the device while `work` runs."""
    MEMORY.restart()
    work()
    return MEMORY.peak


def unit_data(bench: Bench, path: str) -> UnitData:
    """The samples of a unit."""
    run, unit = bench.runner(path), bench.quantized.get_submodule(path)

    def read(index: Tensor | slice) -> tuple[list[Tensor], Tensor]:
        seen: list[Tensor] = []
        with torch.no_grad():
            target = run(lambda *inputs: seen.extend(inputs) or unit(*inputs), index).cpu()
        return seen, target.to(CUDA)

    return UnitData(read, range(32), range(32, 36), PUBLISHED.batch_size)


def weight_phase(bench: Bench, path: str) -> tuple[float, UnitData]:
    """The peak while the weights of a unit are learned, and what the unit saw."""
    unit, data = bench.quantized.get_submodule(path), unit_data(bench, path)
    layers = [layer for _, layer in bench.full_precision(path)]
    return peak_of(lambda: reconstruct_weights(unit, layers, data, "max", PUBLISHED, 0, lambda _: None)), data


def activation_phase(bench: Bench, path: str) -> tuple[float, UnitData]:
    """The peak while the activation scales of a unit are learned, and what the unit saw."""
    unit, data = bench.quantized.get_submodule(path), unit_data(bench, path)
    quantizers = [quantizer for module in bench.modules(path).values() for quantizer in module.act_quantizers]
    return peak_of(lambda: reconstruct_activations(unit, quantizers, data, PUBLISHED, 0, lambda _: None)), data


def one_gradient(bench: Bench) -> float:
    """The peak of one gradient of the end-to-end fine-tuning."""
    blocks = [bench.quantized.get_submodule(path) for path in bench.units]
    tuner = FineTuner(bench.network, bench.quantized, bench.data, FAST, None, True, blocks)
    tuner.targets = torch.zeros(bench.data.inputs[0].shape)
    tensors = [one.tensor for one in tuner.trained]
    return peak_of(lambda: add_gradients(tuner.training_loss, torch.arange(FAST.batch_tune), tensors))


@pytest.fixture
def small():
    """A tiny network of the latent family with attention over 4,096 pixels."""
    one_resolution = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
    config = unet_config(tiny_latent.UNET | tiny_latent.CONDITIONED | one_resolution)
    with pretended_cuda(sizes_only=True):
        with CUDA:
            network = UNetModel(config)
        yield Bench(network, (torch.zeros(12, 4, 64, 64), torch.linspace(0, 999, 12), torch.zeros(12, 8, 16)))


def test_a_unit_with_attention_stays_within_its_budget(small, monkeypatch):
    small.activations_on()
    path = next(path for path in small.units if path.endswith("transformer_blocks.0"))
    assert activation_phase(small, path)[0] < 1.5 * GB
    monkeypatch.setattr(attention, "attend_sparingly", lambda attend, *parts: attend(*parts))
    assert activation_phase(small, path)[0] > 3 * GB  # of all slices at once


def test_fine_tuning_stays_within_its_budget(small, monkeypatch):
    assert one_gradient(small) < 1.5 * GB
    monkeypatch.setattr(finetune, "recomputed", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(attention, "attend_sparingly", lambda attend, *parts: attend(*parts))
    assert one_gradient(small) > 3 * GB  # of all blocks at once


def test_memory_is_counted_until_it_is_freed_and_an_end_is_out_of_memory():
    with pretended_cuda(sizes_only=True, limit=10_000):
        before = MEMORY.live
        x = torch.zeros(1000, device="cuda")
        view = x[10:]
        assert MEMORY.live - before == 4096  # in blocks of 512 bytes
        del x
        assert MEMORY.live - before == 4096
        with pytest.raises(torch.OutOfMemoryError):
            view.double()
        del view
        assert MEMORY.live == before and MEMORY.peak - before == 4096


# --- Stable Diffusion v1 ----------------------------------------------------------------------------


def device_of_moments(device: torch.device, columns: int) -> torch.device:
    """Where moments lie; those in the CPU's memory are not counted, and have no numbers here either."""
    found = place_of_moments(device, columns)
    return torch.device("meta") if found.type == "cpu" else found


place_of_moments = compensation._device_of_moments


@pytest.fixture
def stable_diffusion(monkeypatch):
    """Stable Diffusion v1 on a device of 20 GB. One of several steps that are alike is enough for sizes."""
    monkeypatch.setattr(scale_rules, "RANGE_CANDIDATES", 1)
    monkeypatch.setattr(smoothing, "STRENGTHS", (0.5,))
    monkeypatch.setattr(compensation, "_move_errors", lambda weight, *_: torch.empty_like(weight))
    monkeypatch.setattr(compensation, "_device_of_moments", device_of_moments)
    config = load_config(REPOSITORY / "configs/stable-diffusion/v1-inference.yaml")
    samples = torch.zeros(12, 4, 64, 64), torch.linspace(0, 999, 12), torch.zeros(12, 77, 768)
    with pretended_cuda(sizes_only=True, limit=BUDGET):
        with CUDA:
            network = UNetModel(config.unet)
        yield Bench(network, samples)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["input_blocks.1.1.transformer_blocks.0", "output_blocks.3.0", "output_blocks.9.0"])
def test_the_published_command_for_stable_diffusion_fits_into_20_gb(stable_diffusion, path):
    """Batches of 8: the units with the largest attention, the largest weight and the largest other activations."""
    stable_diffusion.activations_on()
    for phase in (activation_phase, weight_phase):
        peak, data = phase(stable_diffusion, path)
        print(f"{phase.__name__} {path}: {peak / GB:.1f} GB")
        assert data.fitting.rows is None and data.fitting_forward.rows is None  # no batch was halved


@pytest.mark.slow
def test_fine_tuning_of_stable_diffusion_fits_into_20_gb(stable_diffusion, caplog):
    """The preset `fast`. Every parameter is in memory four times: itself, its gradient, and Adam's two moments."""
    bench = stable_diffusion
    blocks = [bench.quantized.get_submodule(path) for path in bench.units]
    tuner = FineTuner(bench.network, bench.quantized, bench.data, FAST, None, True, blocks)
    peak = peak_of(lambda: tuner.run(lambda _: None))
    print(f"fine-tuning: {peak / GB:.1f} GB, batches of {tuner.fitting.rows or FAST.batch_tune}")
    assert "fine-tuning ends" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("path", ["input_blocks.1.1.transformer_blocks.0", "output_blocks.2.0"])
def test_compensated_rounding_of_stable_diffusion_fits_into_20_gb(stable_diffusion, path):
    """The preset `fast`, batches of 32: the units with the largest activations and with the largest moments."""
    bench = stable_diffusion
    wrapped = quantize_model(bench.network, LATENT, W4A8).requires_grad_(False)
    modules, run = (wrapped.get_submodule(path), bench.quantized.get_submodule(path)), bench.runner(path)
    pair = UnitPair(*modules, run, run, torch.arange(64), range(64, 68), FAST.batch_size)
    layers = bench.full_precision(path)
    print(f"compensated {path}: {peak_of(lambda: compensate_unit(pair, layers, True, 0)) / GB:.1f} GB")


@pytest.mark.slow
def test_sensitivity_of_stable_diffusion_fits_into_20_gb(stable_diffusion, monkeypatch):
    """The preset `fast` measures one sample after the other."""
    bench = stable_diffusion
    monkeypatch.setattr(sensitivity, "SAMPLES", 2)
    peak = peak_of(lambda: sensitivity.measure_sensitivity(bench.network, LATENT, W4A8, bench.data, CUDA, True))
    print(f"sensitivity: {peak / GB:.1f} GB")
