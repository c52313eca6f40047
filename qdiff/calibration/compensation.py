"""Error-compensating rounding of one layer in closed form, from second moments of its inputs.

A layer computes X W^T + b in the full-precision network. The quantized network gives it other inputs X', so first the
weight moves to W' = argmin ||X W^T - X' W'^T||^2. Then the columns of W' are rounded one after the other, and each
error is moved to the columns that are not rounded yet (GPTQ, Frantar et al. 2023, arXiv 2210.17323, algorithm 1). The
moments are those of centered inputs, and the bias takes the difference of the means. All of it is free of units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.layers import QuantConv, QuantConvTranspose, QuantLayer, QuantLinear
from qdiff.scale_rules import search_range

COMPENSATED = 1 / 8  # what it leaves of the squared error of nearest rounding, as measured
DAMPING = 0.01  # added to the diagonal of the moments, as a share of its mean
BLOCK = 128  # columns whose errors are moved together
MATRICES = 4  # [K, K] in float64 that are in memory at once while a layer is rounded
ROWS_PER_COLUMN, LEAST_ROWS, MOST_ROWS = 24, 2**14, 2**17  # of the inputs that moments are taken from


@dataclass
class Moments:
    """Second moments of the inputs of one layer, over all rows: receptive fields [K] at positions of the output.

    Attributes:
        full: sum of the rows of the full-precision network, [K].
        quantized: sum of the rows of the quantized network, [K].
        cross: sum of full^T quantized, [K, K].
        square: sum of quantized^T quantized, [K, K].
        weight: sum of the weights of the rows.
    """

    full: Tensor
    quantized: Tensor
    cross: Tensor
    square: Tensor
    weight: float = 0.0

    @classmethod
    def zeros(cls, columns: int, device: torch.device) -> "Moments":
        """Nothing seen yet, for rows of `columns` values."""
        vector = torch.zeros(columns, dtype=torch.float64, device=device)
        matrix = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        return cls(vector, vector.clone(), matrix, matrix.clone())

    def add(self, full: Tensor, quantized: Tensor, weights: Tensor) -> None:
        """Add rows [R, K] of both networks with their weights [R]."""
        weighted, device = quantized * weights[:, None], self.full.device
        self.full += (full * weights[:, None]).double().sum(0).to(device)
        self.quantized += weighted.double().sum(0).to(device)
        self.cross += (full.T @ weighted).to(device)
        self.square += (quantized.T @ weighted).to(device)
        self.weight += float(weights.double().sum())

    def smooth(self, factors: Tensor) -> None:
        """Divide the inputs of the quantized network by a factor for each column, [K]."""
        factors = factors.to(self.square)
        self.quantized = self.quantized / factors
        self.cross = self.cross / factors
        self.square = self.square / torch.outer(factors, factors)

    def take(self, centered: bool) -> tuple[Tensor, Tensor]:
        """(cross, square), which are not held here any more: they are large.

        Args:
            centered: of the inputs without their means.
        """
        cross, square = self.cross, self.square
        self.cross = self.square = square.new_empty(0)
        if centered:
            cross -= torch.outer(self.full, self.quantized).div_(self.weight)
            square -= torch.outer(self.quantized, self.quantized).div_(self.weight)
        return cross, square


class RowSampler:
    """Draws the same receptive fields from the inputs of a layer in both networks.

    Args:
        layer: the layer.
        share: the share of the output positions that is drawn.
        seed: seed of the choice.
    """

    def __init__(self, layer: QuantLayer, share: float, seed: int) -> None:
        self.layer, self.share = layer, share
        self.generator = torch.Generator().manual_seed(seed)

    def positions(self, x: Tensor) -> Tensor:
        """Numbers of output positions of an input, over all samples."""
        total = len(x) * math.prod(output_size(self.layer, x))
        count = max(1, round(total * min(self.share, 1.0)))
        if count >= total:
            return torch.arange(total)
        return torch.randint(0, total, (count,), generator=self.generator)


def output_size(layer: QuantLayer, x: Tensor) -> list[int]:
    """The positions of a layer's output along each dimension but samples and channels."""
    if not isinstance(layer, QuantConv | QuantConvTranspose):
        return list(x.shape[1:-1])
    if isinstance(layer, QuantConvTranspose):
        x = _spread(layer, x)
    sizes = []
    for axis, (size, kernel) in enumerate(zip(x.shape[2:], layer.shape[2:], strict=True)):
        low, high = _padding(layer)[axis]
        reach = layer.geometry["dilation"][axis] * (kernel - 1) + 1
        sizes.append((size + low + high - reach) // _stride(layer)[axis] + 1)
    return sizes


def _stride(layer: QuantConv | QuantConvTranspose) -> tuple[int, ...]:
    """The stride of the convolution that gives the layer's output; see `_spread`."""
    return layer.geometry["stride"] if isinstance(layer, QuantConv) else (1,) * (len(layer.shape) - 2)


def _spread(layer: QuantConvTranspose, x: Tensor) -> Tensor:
    """`x` [N, C, ...] with stride - 1 zeros between its values: what a transposed convolution convolves with stride 1.

    Its kernel is flipped for that.
    """
    strides = layer.geometry["stride"]
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    every: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in strides))
    spread[every] = x
    return spread


def _padding(layer: QuantConv | QuantConvTranspose) -> list[tuple[int, int]]:
    """The padding before and after, of each dimension."""
    padding, kernel, dilation = layer.geometry["padding"], layer.shape[2:], layer.geometry["dilation"]
    if isinstance(layer, QuantConvTranspose):
        sides = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        return [(side, side + extra) for side, extra in zip(sides, layer.output_padding, strict=True)]
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(size, size) for size in padding]


def receptive_fields(layer: QuantLayer, x: Tensor, positions: Tensor) -> Tensor:
    """The inputs that output positions are computed from.

    Args:
        layer: a linear layer or a convolution.
        x: its input, [N, C, ...] or [..., C].
        positions: numbers of output positions over all samples, [R].

    Returns:
        [R, K], in the order of the elements of the weight of an output channel, over the channels of all groups.
    """
    positions = positions.to(x.device)
    if not isinstance(layer, QuantConv | QuantConvTranspose):
        return x.reshape(-1, x.shape[-1])[positions]
    sizes, padding = output_size(layer, x), _padding(layer)
    if isinstance(layer, QuantConvTranspose):
        source, mode = _spread(layer, x), "constant"
    else:
        source, mode = x, "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(source, [side for pair in reversed(padding) for side in pair], mode=mode)
    per_sample = math.prod(sizes)
    sample, rest = positions // per_sample, positions % per_sample
    index: list[Tensor] = []
    dims = len(sizes)
    for axis, size in enumerate(sizes):
        place = rest // math.prod(sizes[axis + 1 :]) % size
        first = place * _stride(layer)[axis]
        offsets = torch.arange(layer.shape[2 + axis], device=x.device) * layer.geometry["dilation"][axis]
        offsets = offsets.flip(0) if isinstance(layer, QuantConvTranspose) else offsets
        shape = [1] * dims
        shape[axis] = -1
        index.append(first.view(-1, *[1] * dims) + offsets.view(1, *shape))
    fields = padded.movedim(1, -1)[(sample.view(-1, *[1] * dims), *index)]  # [R, kernel..., C]
    return fields.movedim(-1, 1).flatten(1)


@torch.no_grad()
def gather_moments(
    layers: tuple[QuantLayer, QuantLayer],
    inputs: Callable[[int, Tensor], list[Tensor]],
    batches: Sequence[Tensor],
    seed: int,
) -> tuple[Moments, Tensor]:
    """The second moments of a layer's inputs, with the weight 1 / (mean square of the output) for each sample.

    Args:
        layers: the layer in the wrapped full-precision network and in the quantized one.
        inputs: from (0 or 1 for the network, sample indices) to the inputs of the layer in all its calls.
        batches: sample indices.
        seed: seed of the choice of rows.

    Returns:
        The moments, and some rows of the quantized network, [R, K], for the choice of ranges.
    """
    full_layer, layer = layers
    columns = math.prod(layer.shape[1:]) * groups_of(layer)
    device = _device_of_moments(layer.weight.device, columns)
    moments, some, share = Moments.zeros(columns, device), [], 0.0
    sampler = RowSampler(layer, 1.0, seed)
    for batch in batches:
        pairs = zip(inputs(0, batch), inputs(1, batch), strict=True)
        for x_full, x in pairs:
            if not share:
                total = len(x) * math.prod(output_size(layer, x)) * len(batches)
                share = sampler.share = min(1.0, min(MOST_ROWS, max(LEAST_ROWS, ROWS_PER_COLUMN * columns)) / total)
            positions = sampler.positions(x)
            rows_full, rows = (receptive_fields(layer, part.float(), positions) for part in (x_full, x))
            moments.add(rows_full, rows, _row_weights(full_layer, x_full, positions))
            some.append(rows[: max(1, 4096 // len(batches))])
    return moments, torch.cat(some)


def _device_of_moments(device: torch.device, columns: int) -> torch.device:
    """Where moments of `columns` columns lie: with the network if it computes in float64 and has room for them.

    The room is a share of all memory, not of what is free now, because a resumed calibration must choose the same.
    """
    size = MATRICES * columns**2 * torch.float64.itemsize
    if device.type == "mps" or (device.type == "cuda" and size > torch.cuda.mem_get_info(device)[1] / 2):
        return torch.device("cpu")
    return device


def _row_weights(layer: QuantLayer, x: Tensor, positions: Tensor) -> Tensor:
    """1 / (mean square of the output of the sample) for each of the rows."""
    output = layer.apply_weight(x, layer.weight).detach().float()
    square = output.reshape(len(x), -1).square().mean(1)
    square = torch.where(square > 0, square, torch.ones_like(square))
    per_sample = math.prod(output_size(layer, x))
    return (1 / square)[positions.to(x.device) // per_sample]


def can_compensate(layer: QuantLayer) -> bool:
    """Whether a layer's output is a product of receptive fields with its weight."""
    return isinstance(layer, QuantLinear | QuantConv | QuantConvTranspose)


def groups_of(layer: QuantLayer) -> int:
    """The groups of a convolution; 1 for other layers."""
    return layer.geometry["groups"] if isinstance(layer, QuantConv | QuantConvTranspose) else 1


def expand_channels(layer: QuantLayer, values: Tensor) -> Tensor:
    """`values` [C] for the columns of receptive fields, [C * kernel]."""
    return values.repeat_interleave(math.prod(layer.shape[2:]))


@torch.no_grad()
def round_compensated(layer: QuantLayer, moments: Moments) -> None:
    """Fix the integers of a layer by error-compensating rounding, and shift its bias by the difference of means.

    Args:
        layer: the layer, with its weight in full precision, smoothed.
        moments: of its inputs, smoothed in the quantized network. They are used up.
    """
    device = moments.square.device
    weight = layer.weight.detach().flatten(1).to(device, torch.float64)  # [N, K / groups]
    original = (
        weight if layer.smoothing is None else weight / expand_channels(layer, layer.smoothing.double().to(device))
    )
    importance = moments.square.diagonal().clone()
    cross, square = moments.take(centered=layer.bias is not None)
    groups, width = groups_of(layer), weight.shape[1]
    parts = [
        (rows, slice(group * width, (group + 1) * width))
        for group, rows in enumerate(torch.arange(len(weight)).chunk(groups))
    ]
    outputs = [original[rows] @ cross[columns, columns] for rows, columns in parts]
    del cross
    solved = [
        _least_squares(weight[rows], output, square[columns, columns])
        for (rows, columns), output in zip(parts, outputs, strict=True)
    ]
    target = torch.cat([own for own, _ in solved])
    scales, zeros = _weight_grids(layer, target, importance)
    high = 2**layer.weight_quantizer.n_bits - 1
    values = torch.cat(
        [
            _round_columns(target[rows], hessian, scales[rows], zeros[rows], high)
            for (rows, _), (_, hessian) in zip(parts, solved, strict=True)
        ]
    )
    integers = values.to(layer.weight.device, torch.float32).view(layer.shape)
    layer.set_integers(layer._parts(integers))
    if layer.bias is not None and moments.weight:
        _shift_bias(layer, original, moments, groups)


def _weight_grids(layer: QuantLayer, target: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the scales and zero points for the weight `target` [N, K], and set them.

    Returns:
        The scale and the zero point of every element, float64 [N, K] each.
    """
    scales, zeros, first = [], [], 0
    shaped = target.float().view(layer.shape)
    for quantizer, part in zip(layer.weight_quantizers, layer._parts(shaped), strict=True):
        values = part.flatten(1)
        columns = values.shape[1]
        weights = None
        if groups_of(layer) == 1:
            weights = importance[first : first + columns]
            weights = (weights / weights.mean()).float() if float(weights.mean()) > 0 else None
        scale, zero = search_range(values, quantizer.n_bits, False, False, weights)
        device = quantizer.scale.device
        quantizer.scale = scale.view_as(quantizer.scale).to(device)
        quantizer.zero_point = zero.view_as(quantizer.zero_point).to(device)
        scales.append(scale.double().expand(-1, columns))
        zeros.append(zero.double().expand(-1, columns))
        first += columns
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def _least_squares(weight: Tensor, outputs: Tensor, square: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight that serves the quantized inputs best.

    Args:
        weight: the weight as it is, [N, K]; damping pulls towards it.
        outputs: sum of (full-precision outputs)^T (quantized inputs), [N, K].
        square: moments of the quantized inputs, [K, K]; damped in place.

    Returns:
        The weight, and the damped moments; (weight, None) if there were no inputs but zeros.
    """
    mean = square.diagonal().mean()
    if not float(mean) > 0:
        return weight, None
    damping = DAMPING * mean
    square.diagonal().add_(damping)
    return torch.linalg.solve(square, (outputs + damping * weight).T).T, square


def _round_columns(weight: Tensor, hessian: Tensor | None, scales: Tensor, zeros: Tensor, high: int) -> Tensor:
    """The integers of a weight, 0 to `high`, [N, K]: column by column, from the most important one."""
    if hessian is None:
        return torch.clamp((weight / scales).round() + zeros, 0, high)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian[order[:, None], order])), upper=True
    )
    integers = _move_errors(weight[:, order], factor, scales[:, order], zeros[:, order], high)
    return integers[:, torch.argsort(order)]


def _move_errors(weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, high: int) -> Tensor:
    """The integers of a weight [N, K], column by column; what a column's error does is taken from the later ones.

    Args:
        weight: the weight, [N, K].
        factor: the upper Cholesky factor of the inverse moments, [K, K].
        scales: of every element, [N, K].
        zeros: of every element, [N, K].
        high: the largest integer.
    """
    w = weight.clone()
    integers = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        own, errors, upper = (
            w[:, start:stop].clone(),
            torch.empty_like(w[:, start:stop]),
            factor[start:stop, start:stop],
        )
        for i in range(stop - start):
            scale, zero = scales[:, start + i], zeros[:, start + i]
            q = torch.clamp((own[:, i] / scale).round() + zero, 0, high)
            integers[:, start + i] = q
            errors[:, i] = (own[:, i] - (q - zero) * scale) / upper[i, i]
            own[:, i + 1 :] -= errors[:, i, None] * upper[i, i + 1 :]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return integers


def _shift_bias(layer: QuantLayer, original: Tensor, moments: Moments, groups: int) -> None:
    """Add to the bias what the means of the outputs differ by."""
    assert layer.bias is not None  # the caller has looked
    quantized = layer.weight.detach().flatten(1).to(original)
    shifts = []
    for w, q, full, mean in zip(
        original.chunk(groups),
        quantized.chunk(groups),
        moments.full.chunk(groups),
        moments.quantized.chunk(groups),
        strict=True,
    ):
        shifts.append((w @ full - q @ mean) / moments.weight)
    shift = torch.cat(shifts).to(layer.bias.device, layer.bias.dtype)
    layer.bias = nn.Parameter(layer.bias.detach() + shift, requires_grad=False)
