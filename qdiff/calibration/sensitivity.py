"""The default policy: which layers get more bits, by how much they disturb the output of the network at hand.

A layer that is quantized adds an error to its own output, and so to the network's output. A few passes measure it for
all layers at once (`qdiff.calibration.effects`). Bits then go where an error disappears at the least cost.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qdiff.architecture import Architecture
from qdiff.calibration.compensation import COMPENSATED
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.effects import squared_effects
from qdiff.calibration.ranges import set_ranges
from qdiff.calibration.smoothing import smooth_layers
from qdiff.config import QuantConfig
from qdiff.layers import QuantLayer, QuantMatMul, multiply_accumulates
from qdiff.model import enable_activations, quantize_model
from qdiff.policy import Policy
from qdiff.quantizers import fake_quantize
from qdiff.scale_rules import FITTED_RULE, search_range
from qdiff.utils.memory import largest_fitting

log = logging.getLogger(__name__)

SAMPLES, VECTORS = 16, 2  # of the measurement: samples, and random directions of the output for each of them
WIDE_ACTS, WIDE_WEIGHTS = (12, 16), (5, 6, 8)  # the widths that sensitive layers get
BISECTIONS = 60


@dataclass
class Sensitivity:
    """What quantizing one layer or attention matmul does, and what it costs.

    Attributes:
        of_input: squared error of the network's output, relative, by quantizing its inputs.
        of_weight: the same by rounding its weight.
        macs: multiply-accumulates of one sample.
        elements: elements of its weight; 0 for attention matmuls.
    """

    of_input: float = 0.0
    of_weight: float = 0.0
    macs: float = 0.0
    elements: int = 0


@dataclass(frozen=True)
class _Choice:
    """Widths for one layer: the squared error that they leave, and the cost beyond the nominal network, in shares."""

    path: str
    widths: tuple[int, int]
    error: float
    bops: float
    size: float


def measure_sensitivity(
    model: nn.Module,
    architecture: Architecture,
    quant: QuantConfig,
    data: CalibrationData,
    device: torch.device,
    smoothing: bool = False,
) -> dict[str, Sensitivity]:
    """Measure every layer and attention matmul, by path.

    Args:
        model: the full-precision network.
        architecture: its architecture.
        quant: the number formats, whose nominal widths are measured.
        data: the samples.
        device: the device of the network.
        smoothing: layers are smoothed where it pays.
    """
    wrapped = quantize_model(model, architecture, quant).requires_grad_(False)
    modules = {path: module for path, module in wrapped.named_modules() if isinstance(module, QuantLayer | QuantMatMul)}
    chosen = _over_time(data, SAMPLES)
    enable_activations(wrapped, False)
    if quant.quant_act:
        if smoothing:
            smooth_layers(wrapped, data, chosen, device)
        largest_fitting(lambda part: set_ranges(wrapped, data, part, FITTED_RULE, device), chosen)
    changes = _Changes(modules, quant.quant_act)
    with logging_redirect_tqdm(), tqdm(total=len(chosen), desc="sensitivity", unit="sample") as progress:
        squares = squared_effects(
            wrapped,
            list(modules),
            changes,
            lambda index: data.run(wrapped, index, device),
            chosen,
            VECTORS,
            progress.update,
        )
    found = {path: Sensitivity(macs=macs / len(chosen)) for path, macs in changes.macs.items()}
    for path, (of_input, of_weight) in squares.items():
        found[path].of_input, found[path].of_weight = of_input, of_weight
    for path in found:
        if isinstance(layer := modules[path], QuantLayer):
            found[path].elements = layer.shape.numel()
    return found


def _over_time(data: CalibrationData, count: int) -> Tensor:
    """The numbers of at most `count` samples, spread evenly from the first time step to the last one, in random order.

    Some layers disturb the output at the last steps of a trajectory alone, which a few random samples may miss.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data), generator=generator)
    if data.spec.time is not None:
        times = data.timesteps(order).cpu()
        if times.numel() == len(order):  # else the second input is no time step
            order = order[times.argsort(stable=True)]
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]
    return chosen[torch.randperm(len(chosen), generator=generator)]


class _Changes:
    """What quantizing the inputs of a layer, and rounding its weight, do to its output; see `squared_effects`.

    Args:
        modules: the wrapped layers, in full precision, and attention matmuls, by path.
        activations: whether inputs are quantized.

    Attributes:
        macs: the multiply-accumulates so far, by path.
    """

    def __init__(self, modules: Mapping[str, QuantLayer | QuantMatMul], activations: bool) -> None:
        self.modules, self.activations = modules, activations
        self.macs: dict[str, float] = defaultdict(float)
        self.rounding = {
            path: _rounding_errors(module) for path, module in modules.items() if isinstance(module, QuantLayer)
        }

    def __call__(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> list[Tensor]:
        module = self.modules[path]
        self.macs[path] += multiply_accumulates(module, args[0], output)
        if isinstance(module, QuantLayer):
            return self._of_layer(module, self.rounding[path], args, kwargs)
        no_change = output.new_zeros(())
        if not self.activations:
            return [no_change, no_change]
        with _quantizing(module):
            return [module.forward(*args) - output, no_change]

    def _of_layer(
        self, layer: QuantLayer, rounding: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        x, *others = args
        bias, layer.bias = layer.bias, None
        try:
            exact = layer.quantize_input(x)
            of_weight = layer.apply_weight(exact, rounding.to(layer.dtype), *others, **kwargs)
            if not self.activations:
                return [x.new_zeros(()), of_weight]
            with _quantizing(layer):
                change = layer.quantize_input(x) - exact
            return [layer.apply_weight(change, layer.effective_weight(), *others, **kwargs), of_weight]
        finally:
            layer.bias = bias


@contextmanager
def _quantizing(module: nn.Module) -> Iterator[None]:
    """Inside the `with`, a module quantizes its inputs."""
    enable_activations(module, True)
    try:
        yield
    finally:
        enable_activations(module, False)


def _rounding_errors(layer: QuantLayer) -> Tensor:
    """What nearest rounding adds to the weight of a layer in full precision, in bfloat16."""
    parts = []
    for part, quantizer in zip(layer._parts(layer.weight.float()), layer.weight_quantizers, strict=True):
        rows = part.flatten(1)
        rounded = fake_quantize(rows, *search_range(rows, quantizer.n_bits, False, False), quantizer.n_bits, False)
        parts.append((rounded - rows).view_as(part))
    return layer._join(parts).to(torch.bfloat16)


def choose_policy(sensitivities: Mapping[str, Sensitivity], quant: QuantConfig, budget: float) -> Policy:
    """Find the widths that disturb the output least within a budget.

    Every layer takes the widths of least (error + price * cost); the price is the lowest one within the budget.

    Args:
        sensitivities: of all layers and attention matmuls, by path.
        quant: the number formats. Layers that its own policy names keep what it says.
        budget: the most that bytes and bit operations may grow, as a share of the nominal ones.

    Returns:
        The entries to put before those of `quant.policy`.
    """
    nominal = _Nominal.of(sensitivities, quant)
    choices = [_choices(path, one, quant, nominal) for path, one in sensitivities.items()]
    price, too_low = 1e6 * max(nominal.error, 1e-30), 0.0
    chosen = _best(choices, price)
    for _ in range(BISECTIONS):
        middle = (price + too_low) / 2 if too_low else price / 4
        found = _best(choices, middle)
        if max(sum(one.bops for one in found), sum(one.size for one in found)) <= budget:
            price, chosen = middle, found
        else:
            too_low = middle
    chosen = [one for one in chosen if one.widths != quant.widths(one.path)]
    log.info(
        "policy: %d layers take other widths, for %+.1f %% bytes of weights and %+.1f %% bit operations",
        len(chosen),
        100 * sum(one.size for one in chosen),
        100 * sum(one.bops for one in chosen),
    )
    return tuple((one.path, _widths(sensitivities[one.path], one.widths, quant)) for one in chosen)


def _best(choices: Sequence[Sequence[_Choice]], price: float) -> list[_Choice]:
    """For each layer the choice of least error and cost at a price; of equal ones the first, which is nominal."""
    return [min(of_layer, key=lambda one: one.error + price * (one.bops + one.size)) for of_layer in choices]


def _widths(one: Sensitivity, widths: tuple[int, int], quant: QuantConfig) -> str:
    weight, act = widths
    if not one.elements:
        return f"A{act}"
    return f"W{weight}A{act}" if quant.quant_act else f"W{weight}"


@dataclass(frozen=True)
class _Nominal:
    """The whole network at its nominal widths: squared error, bit operations, and bits of weights."""

    error: float
    bops: float
    bits: float

    @classmethod
    def of(cls, sensitivities: Mapping[str, Sensitivity], quant: QuantConfig) -> "_Nominal":
        everything = sensitivities.values()
        return cls(
            sum(one.of_input + COMPENSATED * one.of_weight for one in everything),
            sum(one.macs * _product(one, (quant.weight_bit, quant.act_bit), quant) for one in everything),
            sum(one.elements * quant.weight_bit for one in everything),
        )


def _product(one: Sensitivity, widths: tuple[int, int], quant: QuantConfig) -> int:
    """Bit operations of one multiply-accumulate; inputs in full precision have 32 bits."""
    weight, act = widths if quant.quant_act else (widths[0], 32)
    return weight * act if one.elements else act * act


def _choices(path: str, one: Sensitivity, quant: QuantConfig, nominal: _Nominal) -> list[_Choice]:
    """The widths that a layer can take, the nominal ones first."""
    own, usual = quant.widths(path), (quant.weight_bit, quant.act_bit)
    weights, acts = [own[0]], [own[1]]
    if own == usual and not quant.keeps(path):  # else the caller has decided
        if one.elements:
            weights += [wide for wide in WIDE_WEIGHTS if wide > own[0]]
        if quant.quant_act:
            acts += [wide for wide in WIDE_ACTS if wide > own[1]]
    usual_product = _product(one, usual, quant)
    return [
        _Choice(
            path,
            (weight, act),
            # a bit more divides a squared error by four; that of 16-bit inputs vanishes beside the others
            COMPENSATED * one.of_weight * 4.0 ** (quant.weight_bit - weight) + one.of_input * 4.0 ** (usual[1] - act),
            one.macs * (_product(one, (weight, act), quant) - usual_product) / max(nominal.bops, 1e-30),
            one.elements * (weight - usual[0]) / max(nominal.bits, 1e-30),
        )
        for weight in weights
        for act in acts
    ]
