"""What a network that knows nothing of this package is made of, as one forward pass shows it.

The pass is watched for function calls that multiply two activations (attention) and for layers whose input is a
concatenation (shortcuts). A `Summary` says what of it is quantized.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from qdiff.attention import KINDS, SDPA, AttentionCall, call_name, count_matmuls, matmul_names, rewrite
from qdiff.layers import LAYER_TYPES
from qdiff.model import QuantPlan

log = logging.getLogger(__name__)

CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
# Functions that change each channel by itself, so that a concatenation remains one.
CHANNELWISE = {
    *(F.dropout, F.dropout2d, F.relu, torch.relu, Tensor.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.softplus),
    *(F.hardswish, torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, F.interpolate, F.avg_pool2d, F.max_pool2d),
    *(F.pad, Tensor.contiguous, Tensor.clone, Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16),
}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Structure:
    """What a forward pass of a full-precision network showed.

    Attributes:
        calls: for each module whose forward pass multiplies activations by function calls: the calls, in order.
        splits: for each layer whose input is a concatenation: the channels of its first part.
        whole_attentions: modules whose attention is one function with weights of its own (`nn.MultiheadAttention`).
        modules: the modules that run, and that take and return tensors; True: they return one tensor and nothing else.
        order: the layers, in the order in which they run first.
    """

    calls: Mapping[str, tuple[AttentionCall, ...]] = field(default_factory=dict)
    splits: Mapping[str, int] = field(default_factory=dict)
    whole_attentions: tuple[str, ...] = ()
    modules: Mapping[str, bool] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    def matmul_paths(self) -> list[str]:
        """The paths that the attention matmuls of the calls can have."""
        names = {owner: matmul_names([call.name for call in calls]) for owner, calls in self.calls.items()}
        return [f"{owner}.{name}".lstrip(".") for owner in names for call in names[owner] for name in call]


@dataclass
class _Run:
    """A forward pass of a module that is under way."""

    path: str
    module: nn.Module
    takes_tensors: bool
    calls: list[AttentionCall] = field(default_factory=list)


class _Trace(TorchFunctionMode):
    """Watches a forward pass.

    Args:
        model: the network. Its parameters and buffers are no activations.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # views of a parameter (its transpose) share its storage
        self.constants = {_storage(part) for part in [*model.parameters(), *model.buffers()] if part.numel()}
        self.layered = {
            id(module) for module in model.modules() if any(type(inner) in LAYER_TYPES for inner in module.modules())
        }
        self.running: list[_Run] = []
        self.calls: dict[str, tuple[AttentionCall, ...]] = {}
        self.whole_attentions: set[str] = set()
        self.joined = WeakTensorKeyDictionary()  # {concatenation: (its dimension, size of the first part)}
        self.computed = WeakTensorKeyDictionary()  # tensors that a layer of the network had a part in
        self.first_parts: dict[str, set[int]] = defaultdict(set)  # of every run of a layer; 0: no concatenation
        self.modules: dict[str, bool] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in KINDS and self.running:
            run = self.running[-1]
            run.calls.append(self._examined(run.module, func, args, kwargs, output))
        elif func is F.multi_head_attention_forward and self.running:
            self.whole_attentions.add(self.running[-1].path)
        elif func in CONCATENATIONS:
            self._note_concatenation(output, *args, **kwargs)
        elif func in CHANNELWISE and isinstance(args[0], Tensor) and args[0] in self.joined:
            dim, _ = self.joined[args[0]]
            if output.dim() == args[0].dim() and output.shape[dim] == args[0].shape[dim]:
                self.joined[output] = self.joined[args[0]]
        if any(part in self.computed for part in _tensors([*args, *kwargs.values()])):
            self._mark_computed(output)
        return output

    def enter(self, path: str, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note that the forward pass of a module begins."""
        x = next(_tensors([*args, *kwargs.values()]), None)
        self.running.append(_Run(path, module, takes_tensors=x is not None))
        if type(module) in LAYER_TYPES:
            self.first_parts[path].add(0 if x is None else self._first_part(module, x))

    def leave(self, output: Any) -> None:
        """Note that the innermost forward pass ends."""
        run = self.running.pop()
        if run.takes_tensors and any(part.is_floating_point() for part in _tensors([output])):
            self.modules[run.path] = isinstance(output, Tensor) and self.modules.get(run.path, True)
        if run.calls:
            earlier = self.calls.get(run.path)
            self.calls[run.path] = tuple(run.calls) if earlier is None else _merged(earlier, run.calls)
        if id(run.module) in self.layered:
            self._mark_computed(output)

    def _mark_computed(self, output: Any) -> None:
        for part in _tensors([output]):
            self.computed[part] = True

    def _note_concatenation(self, output: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> None:
        # concatenations of the network's inputs (sine and cosine of the time step) are no shortcuts
        if len(tensors) > 1 and any(part in self.computed for part in tensors):
            dim %= output.dim()
            self.joined[output] = dim, tensors[0].shape[dim]

    def _first_part(self, layer: nn.Module, x: Tensor) -> int:
        """The channels of the first part of the concatenation `x`; 0: it is none that `layer` can take in two."""
        dim, first = self.joined.get(x, (0, 0))
        channels = LAYER_TYPES[type(layer)].channels % max(1, x.dim())
        grouped = getattr(layer, "groups", 1) > 1
        return first if dim == channels and 0 < first < x.shape[dim] and not grouped else 0

    def _examined(
        self, owner: nn.Module, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], output: Any
    ) -> AttentionCall:
        """A call, with the operands that hold probabilities or the reason why it stays in full precision."""
        name = call_name(func, args, kwargs)
        operands: list[tuple[Tensor, Tensor]] = []

        def multiply(a: Tensor, b: Tensor) -> Tensor:
            operands.append((a, b))
            return torch.matmul(a, b)

        factors = _factors(name, args, kwargs)
        if len(factors) < 2:  # an einsum of one operand only moves or sums
            return AttentionCall(name)
        try:
            result = rewrite(func, (multiply, multiply), args, kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            return AttentionCall(name, reason=str(error).partition("\n")[0])
        operands = operands[: count_matmuls(name)]
        probabilities = tuple(_probabilities(a, b) for a, b in operands)
        real = all(part.is_floating_point() for pair in operands for part in pair)
        outer = any(a.shape[-1] == 1 and which is None for (a, _), which in zip(operands, probabilities, strict=True))
        if not real or outer:  # an outer product is no attention: a time step times its frequencies
            return AttentionCall(name)
        if any(_storage(part) in self.constants for part in factors):
            return AttentionCall(name, reason="a factor is a parameter or buffer")
        taken = [attribute for names in matmul_names([name]) for attribute in names if hasattr(owner, attribute)]
        if isinstance(owner, CONTAINERS) or taken:
            return AttentionCall(name, reason="its module has no place for attention matmuls")
        if not _is_close(result, output):
            return AttentionCall(name, reason="as matmuls it gives another result")
        return AttentionCall(name, probabilities)


def _merged(first: Sequence[AttentionCall], second: Sequence[AttentionCall]) -> tuple[AttentionCall, ...]:
    """The calls of two runs of a module."""
    if [call.name for call in first] != [call.name for call in second]:
        return tuple(AttentionCall(call.name, reason="the calls of its module change") for call in first)
    return tuple(
        old if old == new else AttentionCall(old.name, tuple(None for _ in old.probabilities), old.reason or new.reason)
        for old, new in zip(first, second, strict=True)
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _factors(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call multiplies, without what it adds: a mask, or the first argument of `baddbmm`."""
    if name == SDPA:
        return list(_tensors([*args[:3], *(value for key, value in kwargs.items() if key != "attn_mask")]))
    if name == "baddbmm":
        return list(_tensors([*args[1:], *(value for key, value in kwargs.items() if key != "input")]))
    return list(_tensors([*args, *kwargs.values()]))


def _probabilities(a: Tensor, b: Tensor) -> int | None:
    """Which operand of a matmul [..., M, K] x [..., K, N] holds probabilities over K: 0, 1, or None."""
    for number, (operand, dim) in enumerate(((a, -1), (b, -2))):
        total = operand.float().sum(dim)
        tolerance = 1e-3 if operand.dtype == torch.float32 else 2e-2
        if bool((operand >= 0).all()) and bool(((total - 1).abs() <= tolerance).all()):
            return number
    return None


def _is_close(result: Tensor, expected: Tensor) -> bool:
    """Whether a call gives the same as matmuls, up to the rounding of its precision."""
    if result.shape != expected.shape:
        return False
    error = torch.linalg.vector_norm((result - expected).float())
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return bool(error <= tolerance * torch.linalg.vector_norm(expected.float()))


@torch.no_grad()
def find_structure(model: nn.Module, run: Callable[[], Any]) -> Structure:
    """Watch one forward pass of a full-precision network.

    Args:
        model: the network, in eval mode.
        run: runs it on a few samples.
    """
    trace = _Trace(model)
    handles = []
    for path, module in model.named_modules():

        def enter(inner: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            trace.enter(path, inner, args, kwargs)

        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(lambda _, __, output: trace.leave(output)),
        ]
    try:
        with trace:
            run()
    finally:
        for handle in handles:
            handle.remove()
    splits = {path: next(iter(parts)) for path, parts in trace.first_parts.items() if len(parts) == 1}
    return Structure(
        trace.calls,
        {path: first for path, first in splits.items() if first},
        tuple(trace.whole_attentions),
        trace.modules,
        tuple(trace.first_parts),
    )


@dataclass(frozen=True)
class Summary:
    """What `qdiff.quantize` quantizes in a network, and what stays in full precision.

    Attributes:
        layers: the paths of the quantized layers.
        matmuls: the paths of the quantized attention matmuls.
        blocks: the paths of the blocks that are reconstructed as a whole.
        splits: for each quantized layer with two quantizers for its concatenated input: the channels of its first part.
        kept_layers: the paths of layers in full precision that run and have a quantized form.
        kept_matmuls: for each module with attention matmuls in full precision: how many, and why.
        unsplit: for each quantized layer with one quantizer for a concatenation: the channels of the first part.
    """

    layers: tuple[str, ...]
    matmuls: tuple[str, ...]
    blocks: tuple[str, ...]
    splits: Mapping[str, int]
    kept_layers: tuple[str, ...]
    kept_matmuls: Mapping[str, tuple[int, str]]
    unsplit: Mapping[str, int]

    def log(self, activations: bool) -> None:
        """Log one line for what is quantized and one for each kind of thing that is not.

        Args:
            activations: whether activations are quantized; if not, matmuls of activations are not mentioned.
        """
        counts = [f"{len(self.layers)} layers"]
        if activations:
            counts.append(f"{len(self.matmuls)} attention matmuls")
        log.info("quantized: %s", ", ".join([*counts, f"{len(self.splits)} split shortcuts"]))
        log.info("reconstructed as a whole: %d blocks", len(self.blocks))
        if activations and self.kept_matmuls:
            total = sum(count for count, _ in self.kept_matmuls.values())
            places = (f"{path or 'the network'} ({count}): {why}" for path, (count, why) in self.kept_matmuls.items())
            log.warning("%d attention matmuls stay in full precision: %s", total, "; ".join(places))
        if self.unsplit:
            places = (f"{path}: {first}" for path, first in self.unsplit.items())
            log.warning(
                "%d layers see a concatenation through one quantizer (not among splits): %s",
                len(self.unsplit),
                ", ".join(places),
            )
        if self.kept_layers:
            log.warning(
                "%d layers stay in full precision (keep): %s", len(self.kept_layers), ", ".join(self.kept_layers)
            )


def summarize(structure: Structure, plan: QuantPlan, blocks: Iterable[str]) -> Summary:
    """Compare what a forward pass showed with what is quantized.

    Args:
        structure: what a forward pass showed.
        plan: what is quantized.
        blocks: the paths of the blocks.
    """
    kept: dict[str, tuple[int, str]] = dict.fromkeys(structure.whole_attentions, (2, "computed as a whole"))
    for owner, calls in structure.calls.items():
        if owner in plan.matmuls:  # a MatMul module, which is replaced
            continue
        reasons: list[str] = []
        for call, names in zip(calls, matmul_names([call.name for call in calls]), strict=True):
            if call.reason or call.probabilities:
                lost = [name for name in names if f"{owner}.{name}".lstrip(".") not in plan.matmuls]
                reasons += [call.reason or "kept"] * len(lost)
        if reasons:
            kept[owner] = len(reasons), ", ".join(dict.fromkeys(reasons))
    splits = {path: first for path, first in plan.layers.items() if first}
    unsplit = {path: first for path, first in structure.splits.items() if plan.layers.get(path) == 0}
    kept_layers = tuple(path for path in structure.order if path not in plan.layers)
    return Summary(tuple(plan.layers), tuple(plan.matmuls), tuple(blocks), splits, kept_layers, kept, unsplit)


def remember_summary(network: nn.Module, summary: Summary) -> None:
    """Attach a summary to the network that `qdiff.quantize` returns."""
    network.quantization_summary = summary  # type: ignore[assignment]  # a plain attribute


def describe(network: nn.Module) -> Summary | None:
    """What is quantized in the network that `qdiff.quantize` returned; None for another network."""
    return getattr(network, "quantization_summary", None)
