"""The default policy: which layers get more bits, by how much they disturb the output of the network at hand.

A layer that is quantized adds an error d to its own output, and J d to the network's output, with the Jacobian J. With
random signs v the mean of (v^T J d)^2 is ||J d||^2 (Hutchinson 1990), and one backward pass gives v^T J at every layer.
So a few passes measure all layers at once. Bits then go where an error disappears at the least cost.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.architecture import Architecture
from qdiff.calibration.data import CalibrationData
from qdiff.config import QuantConfig
from qdiff.layers import ActQuantizer, QuantLayer, QuantMatMul, positions
from qdiff.model import quantize_model
from qdiff.policy import Policy
from qdiff.quantizers import quantize_nearest
from qdiff.scale_rules import search_range

log = logging.getLogger(__name__)

SAMPLES, PROBES, BATCH = 16, 4, 8  # of the measurement
COMPENSATED = 1 / 8  # what error-compensating rounding leaves of the squared error of nearest rounding, as measured
WIDE_ACT, WIDE_WEIGHTS = 16, (5, 6, 8)  # the widths that sensitive layers get
BISECTIONS = 60
VALUES = 2**14  # of an activation that its range is searched on


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
    model: nn.Module, architecture: Architecture, quant: QuantConfig, data: CalibrationData, device: torch.device
) -> dict[str, Sensitivity]:
    """Measure every layer and attention matmul, by path.

    Args:
        model: the full-precision network.
        architecture: its architecture.
        quant: the number formats, whose nominal widths are measured.
        data: the samples.
        device: the device of the network.
    """
    wrapped = quantize_model(model, architecture, replace(quant, time_bounds=())).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data), generator=generator)[:SAMPLES]
    probe = _Probe(wrapped, quant.quant_act)
    with torch.enable_grad(), probe.watching():
        for batch in chosen.split(BATCH):
            output = data.run(wrapped, batch, device).float()
            size = output.detach().flatten(1).norm(dim=1)
            for number in range(PROBES):
                signs = torch.randint(0, 2, output.shape, generator=generator).to(device) * 2.0 - 1
                projected = ((output * signs).flatten(1).sum(1) / torch.where(size > 0, size, 1)).sum()
                probe.backward(projected, keep=number + 1 < PROBES)
            probe.next_batch()
    total = PROBES * len(chosen)
    for found in probe.found.values():
        found.of_input, found.of_weight = found.of_input / total, found.of_weight / total
        found.macs /= len(chosen)
    return probe.found


class _Probe:
    """Watches forward passes of a wrapped network and adds up (v^T J d)^2 for every layer."""

    def __init__(self, wrapped: nn.Module, activations: bool) -> None:
        self.activations = activations
        self.modules = {
            path: module for path, module in wrapped.named_modules() if isinstance(module, QuantLayer | QuantMatMul)
        }
        self.found = {path: Sensitivity() for path in self.modules}
        self.outputs: list[tuple[str, Tensor, list[Tensor]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside the `with`."""
        handles = [
            module.register_forward_hook(self._hook(path), with_kwargs=True) for path, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        found = self.found[path]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            with torch.no_grad():
                if isinstance(module, QuantLayer):
                    x, *others = args
                    found.elements = module.weight.numel()
                    found.macs += positions(module, x, output) * found.elements
                    errors = self._layer_errors(
                        module, x.detach(), lambda x, w: module.apply_weight(x, w, *others, **kwargs)
                    )
                else:
                    assert isinstance(module, QuantMatMul)  # the hook is registered on no others
                    found.macs += output.numel() * args[0].shape[-1]
                    errors = self._matmul_errors(module, *(arg.detach() for arg in args))
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            self.outputs.append((path, output, errors))
            return output.clone()  # what follows may change it in place

        return hook

    def _layer_errors(
        self, layer: QuantLayer, x: Tensor, apply_weight: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """The errors of a layer's output by its input and by its weight; `apply_weight` as the network calls it."""
        weight, bias = layer.weight, layer.bias
        rounded = [
            _quantized(part, q.n_bits, False, False, rows=True)
            for part, q in zip(layer._parts(weight), layer.weight_quantizers, strict=True)
        ]
        layer.bias = None
        try:
            of_weight = apply_weight(x, layer._join(rounded) - weight)
            if not self.activations:
                return [torch.zeros_like(of_weight), of_weight]
            parts = zip(layer._parts(x), layer.act_quantizers, strict=True)
            coarse = layer._join([_quantized_input(part, quantizer) for part, quantizer in parts])
            return [apply_weight(coarse - x, weight), of_weight]
        finally:
            layer.bias = bias

    def _matmul_errors(self, matmul: QuantMatMul, a: Tensor, b: Tensor) -> list[Tensor]:
        if not self.activations:
            return []
        first, second = matmul.act_quantizers
        return [_quantized_input(a, first) @ _quantized_input(b, second) - a @ b]

    def backward(self, projected: Tensor, keep: bool) -> None:
        """Add up the products of the gradients of `projected` with the errors."""
        outputs = [output for _, output, _ in self.outputs]
        gradients = torch.autograd.grad(projected, outputs, retain_graph=keep, allow_unused=True)
        for (path, _, errors), gradient in zip(self.outputs, gradients, strict=True):
            if gradient is None:
                continue
            found = self.found[path]
            products = [(gradient.float() * error.float()).flatten(1).sum(1) for error in errors]
            squares = [float(product.square().sum()) for product in products]
            found.of_input += squares[0] if squares else 0.0
            found.of_weight += squares[1] if len(squares) > 1 else 0.0

    def next_batch(self) -> None:
        """Forget the outputs of the last forward pass."""
        self.outputs = []


def _quantized_input(x: Tensor, quantizer: ActQuantizer) -> Tensor:
    return _quantized(x, quantizer.n_bits, quantizer.symmetric, quantizer.always_zero, rows=False)


def _quantized(x: Tensor, n_bits: int, symmetric: bool, always_zero: bool, rows: bool) -> Tensor:
    """`x` by nearest rounding, with one grid for each index of the first dimension, or one for all."""
    values = x.detach().float()
    few = values.flatten(1) if rows else values.reshape(1, -1)
    if not rows and few.shape[1] > VALUES:
        ends = torch.stack([few.amin(), few.amax()])[None]
        few = torch.cat([few[:, :: few.shape[1] // VALUES], ends], 1)
    scale, zero = search_range(few, n_bits, symmetric, always_zero)
    shape = (-1, *[1] * (x.dim() - 1)) if rows else ()
    scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((quantize_nearest(values, scale, zero, n_bits, symmetric) - zero) * scale).to(x.dtype)


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
        if quant.quant_act and own[1] < WIDE_ACT:
            acts.append(WIDE_ACT)
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
