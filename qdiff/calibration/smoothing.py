"""Smoothing: a factor for each input channel moves outliers from the activations to the weights of a layer.

    s_c = (max |x_c| / max |x|)^a / (max |w_c| / max |w|)^(1 - a)        (SmoothQuant, arXiv 2211.10438, eq. 4)

The input is divided by s, the weight is multiplied by it. Both maxima are relative to the largest of all channels, so
s has no unit. Of several a the one is taken with which 8-bit inputs (or those of the layer's width) and rounded weights
give the least error of the output; layers that gain little stay as they are.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.compensation import (
    COMPENSATED,
    can_compensate,
    expand_channels,
    groups_of,
    output_size,
    receptive_fields,
)
from qdiff.calibration.data import CalibrationData
from qdiff.layers import ActQuantizer, QuantLayer
from qdiff.model import quant_layers
from qdiff.quantizers import fake_quantize
from qdiff.scale_rules import search_range
from qdiff.utils.memory import largest_fitting

STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # the values of a
LEAST_GAIN = 0.2  # share of the squared error that smoothing must take away
ROWS, VALUES = 1024, 2**16  # of the inputs that errors and ranges are measured on
FLOOR = 1e-4  # the smallest relative maximum of a channel


@torch.no_grad()
def smooth_layers(wrapped: nn.Module, data: CalibrationData, chosen: Tensor, device: torch.device) -> None:
    """Smooth the layers of a wrapped network in full precision that gain by it.

    Args:
        wrapped: the network; changed in place.
        data: the samples.
        chosen: numbers of the samples that rows are taken from, [S].
        device: where the network is.
    """
    layers = {path: layer for path, layer in quant_layers(wrapped).items() if can_compensate(layer)}
    seen: dict[str, list[Tensor]] = {}
    sampler = torch.Generator().manual_seed(0)

    def hook(path: str, layer: QuantLayer, args: tuple[Any, ...], _: Tensor) -> None:
        x, rows = args[0].detach(), seen.setdefault(path, [])
        total = len(x) * math.prod(output_size(layer, x))
        count = min(total, max(1, ROWS * len(x) // len(chosen)))
        rows.append(receptive_fields(layer, x.float(), torch.randint(0, total, (count,), generator=sampler)))

    def gather(fitting: Tensor) -> None:
        seen.clear()
        for part in data.uniform_parts(fitting):
            data.run(wrapped, part, device)

    handles = [layer.register_forward_hook(partial(hook, path)) for path, layer in layers.items()]
    try:
        largest_fitting(gather, chosen)
    finally:
        for handle in handles:
            handle.remove()
    for path, rows in seen.items():
        choose_smoothing(layers[path], torch.cat(rows))


@torch.no_grad()
def choose_smoothing(layer: QuantLayer, rows: Tensor) -> float:
    """Smooth a layer if its output gains by it.

    Args:
        layer: the layer, with its weight in full precision and without smoothing.
        rows: receptive fields of its inputs, [R, K].

    Returns:
        The strength a that was taken; 0: none.
    """
    quantizer = layer.act_quantizer
    if groups_of(layer) > 1 or quantizer.n_bits > 8 or not float(rows.abs().amax()) > 0:
        return 0.0
    rows = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=rows.device).round().long()]
    weight = layer.weight.detach().float().flatten(1)
    least = _error(layer, rows, weight, torch.ones(weight.shape[1], device=weight.device)) * (1 - LEAST_GAIN)
    best, chosen = 0.0, None
    for strength in STRENGTHS:
        factors = _factors(layer, rows, weight, strength)
        error = _error(layer, rows, weight, expand_channels(layer, factors))
        if error < least:
            best, chosen, least = strength, factors, error
    if chosen is not None:
        layer.smooth(chosen)
    return best


def _channel_maxima(layer: QuantLayer, columns: Tensor) -> Tensor:
    """From the largest values of all columns [K] to those of all channels [C], relative to the largest of all."""
    kernel = math.prod(layer.shape[2:])
    maxima = columns.view(-1, kernel).amax(1)
    return (maxima / maxima.amax().clamp(min=torch.finfo(maxima.dtype).tiny)).clamp(min=FLOOR)


def _factors(layer: QuantLayer, rows: Tensor, weight: Tensor, strength: float) -> Tensor:
    inputs, weights = (_channel_maxima(layer, values.abs().amax(0)) for values in (rows, weight))
    return inputs**strength / weights ** (1 - strength)


def _error(layer: QuantLayer, rows: Tensor, weight: Tensor, factors: Tensor) -> float:
    """The squared error of the output with smoothed and quantized inputs and weights; a half has its own grid."""
    split = layer.split * math.prod(layer.shape[2:])
    spans = [slice(0, split), slice(split, None)] if split else [slice(None)]
    of_inputs, of_weights = rows.new_zeros(len(rows), len(weight)), rows.new_zeros(len(rows), len(weight))
    for span, act, quantizer in zip(spans, layer.act_quantizers, layer.weight_quantizers, strict=True):
        x, w = rows[:, span] / factors[span], weight[:, span] * factors[span]
        of_inputs += (_quantized_input(x, act) - x) @ w.T
        of_weights += (
            x @ (fake_quantize(w, *search_range(w, quantizer.n_bits, False, False), quantizer.n_bits, False) - w).T
        )
    # relative to the output, because squares of large values leave the range of float32
    size = (rows @ weight.T).abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
    return float((of_inputs / size).square().sum() + COMPENSATED * (of_weights / size).square().sum())


def _quantized_input(x: Tensor, quantizer: ActQuantizer) -> Tensor:
    values = x.flatten()
    step = max(1, len(values) // VALUES)
    ends = torch.stack([values.amin(), values.amax()])
    few = torch.cat([values[::step], ends])[None]
    scale, zero = search_range(few, quantizer.n_bits, quantizer.symmetric, quantizer.always_zero)
    return fake_quantize(x, scale, zero, quantizer.n_bits, quantizer.symmetric)
