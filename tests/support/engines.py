"""Quantized layers, attention matmuls and tiny networks for the tests of the engines."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddim.config import ModelConfig
from ddim.family import PIXEL
from ldm.config import load_config
from ldm.family import LATENT
from ldm.unet import UNetModel
from qdiff.architecture import AttentionMatMulSpec
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.ranges import init_activation_ranges, timestep_group_bounds
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines import cpu, probe
from qdiff.engines.operands import Int8Weight
from qdiff.layers import QuantLayer, QuantMatMul
from qdiff.model import enable_activations, init_weights, quant_layers, quantize_model
from qdiff.policy import Policy
from qdiff.scale_rules import choose_qparams
from tests.support import golden, tiny, tiny_latent

LINEAR = QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True, quant_mode="linear")
EXACT = probe.largest_exact_weight()  # beyond it products are wrong on this processor
SATURATES = probe.why_unavailable() or ("no VNNI" if EXACT < probe.LARGEST_BYTE else None)


def _int_mm_saturates() -> str | None:
    """The same for `torch._int_mm`, which attentions and the GPU engine's linear layers use."""
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    right = bool((torch._int_mm(largest, largest) == 64 * 127 * 127).all())
    return None if right else "torch._int_mm saturates here"


INT_MM_SATURATES = _int_mm_saturates()


def quantized_layer(
    layer: nn.Module,
    kind: type,
    bits: int,
    symmetric: bool,
    method: str,
    x: torch.Tensor,
    split: int = 0,
    act_bit: int = 8,
    smoothing: torch.Tensor | None = None,
):
    """The quantized form of a layer for inputs like `x`, whose quantizers are on."""
    quantized = kind(layer, bits, act_bit, symmetric, split).requires_grad_(False)
    if smoothing is not None:
        quantized.smooth(smoothing)
    quantized.init_weight_scales(method)
    for quantizer, part in zip(quantized.act_quantizers, quantized._parts(quantized.quantize_input(x)), strict=True):
        quantizer.set_qparams(*choose_qparams(part, act_bit, symmetric=symmetric, method=method))
        quantizer.enabled = True
    return quantized


def on_grid(layer: QuantLayer, x: torch.Tensor) -> torch.Tensor:
    """An input near `x` whose values lie in the middle of what rounds to one integer, so that none can flip."""
    quantized = layer.quantize_input(x)
    return quantized if layer.smoothing is None else quantized * layer._along_channels(layer.smoothing, x.dim())


def attention_matmul(symmetric: bool, sm_abit: int):
    config = QuantConfig(quant_act=True, a_sym=symmetric, sm_abit=sm_abit)
    return AttentionMatMulSpec(("w", "v"), softmax="w", always_zero=True, follows_a_sym=False).make(config, None)


def check(layer: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-6) -> bool:
    """The integer form of a layer against the simulation in float64.

    Shape and type are checked on every processor; numbers where they can be right.

    Returns:
        Whether numbers were compared.
    """
    found = cpu.integer_form(layer)(*inputs) + 0
    expected = copy.deepcopy(layer).double()(*(x.double() for x in inputs))
    assert found.shape == expected.shape and found.dtype == torch.float32
    if not right(layer):
        return False
    error = golden.relative_error(found.double(), expected)
    assert error < tolerance, f"{layer}: relative error {error}"
    return True


def right(model: nn.Module) -> bool:
    """Whether integer products of these layers are right on this processor.

    Without VNNI, sums of two products with weights beyond 64 overflow 16 bits.
    """
    layers = list(model.modules())
    wide = any(
        Int8Weight(quantizer).integers.short().abs().max() > EXACT
        for layer in layers
        if isinstance(layer, QuantLayer)
        for quantizer in layer.weight_quantizers
        if quantizer.n_bits <= 8
    )
    attends = any(
        isinstance(layer, QuantMatMul) and all(q.n_bits <= 8 for q in layer.act_quantizers) for layer in layers
    )
    return not wide and not (attends and INT_MM_SATURATES)


def skip_numbers(compared: bool) -> None:
    """Say, as the end of a test, that its numbers were not (all) compared."""
    if not compared:
        pytest.skip(f"numbers of 8-bit products are not compared: {SATURATES or INT_MM_SATURATES}")


def factors(channels: int) -> torch.Tensor:
    """Factors of a smoothing, from 1/4 to 4."""
    return torch.exp2(torch.rand(channels) * 4 - 2)


def network_of_policy(policy: Policy, model: ModelConfig = tiny.MODEL, grouped: bool = False, **settings):
    """A tiny pixel network by nearest rounding, W4 unless `settings` say more, with two of three layers smoothed.

    Returns:
        The network, the calibration samples, and the number formats.
    """
    network = tiny.unet(config=model)
    rows = tiny.rows(network)
    bounds = timestep_group_bounds(rows, 3) if grouped else ()
    formats = {"weight_bit": 4, "quant_act": True, "split": True, "quant_mode": "linear"} | settings
    quant = QuantConfig(policy=policy, time_bounds=bounds, **formats)
    quantized = quantize_model(network, PIXEL, quant).requires_grad_(False)
    torch.manual_seed(0)
    for index, layer in enumerate(quant_layers(quantized).values()):
        if index % 3 != 1:
            layer.smooth(factors(layer.shape[layer.channels]))
    init_weights(quantized, "max")
    init_activation_ranges(quantized, rows, "max", CalibrationConfig(), torch.device("cpu"))
    enable_activations(quantized, True)
    return quantized, rows, quant


def network_of(kind, folder, **changes):
    """A tiny network of a family, with changes of its configuration: (network, architecture, calibration samples)."""
    if kind == "pixel":
        network = tiny.unet(config=replace(tiny.MODEL, **changes))
        return network, PIXEL, tiny.rows(network)
    torch.manual_seed(0)
    config = load_config(tiny_latent.model_folder(folder / kind, kind) / "config.yaml")
    unet = UNetModel(replace(config.unet, **changes)).eval().requires_grad_(False)
    inputs = [torch.randn(32, 4, 8, 8), torch.linspace(0, 999, 32)]
    if kind == "text":
        inputs.append(torch.randn(32, 8, 16))
    return unet, LATENT, CalibrationData(tuple(inputs))
