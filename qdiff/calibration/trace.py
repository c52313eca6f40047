"""Tracing: in which order the units of a network run, how they are called, and which needs the output of which."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qdiff.calibration.data import CalibrationData
from qdiff.calibration.schedule import Dependencies, Node, plan
from qdiff.calls import Placeholder, SampleAxis, SampleCount, map_leaves, named_leaves
from qdiff.layers import QuantLayer
from qdiff.model import is_inside

log = logging.getLogger(__name__)

FEW, MORE = 2, 3  # samples of the passes that are compared: what differs depends on the number of samples
TOLERANCE = 1e-3  # up to which values repeat themselves, as a share of the largest one


@dataclass(frozen=True)
class OutputPart(Placeholder):
    """Stands for a tensor with a part for each sample among what a module returns.

    Attributes:
        index: its place among these tensors.
        axis: where its samples are.
        shape: the shape of one sample, after `SampleAxis.to_rows`.
        dtype: its type.
        size: the root mean square of its values in the trace.
    """

    index: int
    axis: SampleAxis
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: float = field(compare=False)


@dataclass(frozen=True)
class CallForm:
    """The form of one call of a module.

    Attributes:
        inputs: for each leaf of its inputs where the samples are, or that it is a multiple of their number; None: it
            has nothing to do with them.
        output: what it returns, with an `OutputPart` for each tensor with a part for each sample.
    """

    inputs: tuple[SampleAxis | SampleCount | None, ...]
    output: Any = field(compare=False)

    @property
    def parts(self) -> list[OutputPart]:
        """The tensors that it returns with a part for each sample."""
        return [leaf for _, leaf in named_leaves(self.output) if isinstance(leaf, OutputPart)]


@dataclass(frozen=True)
class ExecutionOrder:
    """The units in the order in which they complete, and how long each output is needed.

    Attributes:
        units: the paths of the units, in order.
        left_out: layers that cannot be fitted as a unit, by path, and why. They are in no unit.
        forms: the form of every node (`qdiff.calibration.schedule`).
        dependencies: which node needs which.
        last_use: for each node that is cached the position of the last unit that needs it.
        peak_elements: the most elements of one sample that are cached at once, inputs and outputs.
    """

    units: list[str]
    left_out: dict[str, str]
    forms: dict[Node, CallForm]
    dependencies: Dependencies
    last_use: dict[Node, int]
    peak_elements: int


def trace_execution(
    model: nn.Module, units: Sequence[str], data: CalibrationData, device: torch.device
) -> ExecutionOrder:
    """Trace forward passes on a few samples: in which order units run, and which needs the output of which.

    A unit takes and returns tensors with a part for each sample, and has no effects but its output. A block that is not
    so is replaced by the quantized layers inside it, and a layer that is not so is left out.

    Args:
        model: the network.
        units: paths of the units, in any order.
        data: the samples.
        device: where the network is.

    Raises:
        RuntimeError: units that are not reached.
    """
    chosen, left_out, never_cached = list(units), dict[str, str](), set[str]()
    while wrong := (trace := _Trace(model, chosen, never_cached, data, device)).find_wrong():
        for path, reason in wrong.items():
            if path not in chosen:
                never_cached.add(path)
                continue
            log.debug("%s: no unit: %s", path, reason)
            inner = model.get_submodule(path).named_modules(prefix=path)
            layers = [name for name, layer in inner if isinstance(layer, QuantLayer) and name != path]
            if not layers:
                left_out[path] = reason
            chosen = [unit for unit in chosen if unit != path]
            chosen += [layer for layer in layers if layer not in chosen and layer not in left_out]
    return trace.order(left_out)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another `forward` inside the `with`."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward  # as an assignment does, which takes longer
        yield
    finally:
        for module in forwards:
            del vars(module)["forward"]
        for module, forward in own.items():
            vars(module)["forward"] = forward


class _Origins(TorchDispatchMode):
    """Follows which nodes every tensor is computed from, by its memory: views and operations in place count."""

    def __init__(self) -> None:
        super().__init__()
        self.of_memory: dict[int, frozenset[Node]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        places = {_memory(tensor) for tensor in _tensors([args, kwargs or {}])}
        found = frozenset[Node]().union(*(self.of_memory.get(place, ()) for place in places))
        for tensor in _tensors(output):
            place = _memory(tensor)
            # memory that no input has is new, whatever was there before
            self.of_memory[place] = found | self.of_memory.get(place, frozenset()) if place in places else found
        return output

    def of(self, value: Any) -> frozenset[Node]:
        """The nodes that the tensors in `value` are computed from."""
        return frozenset[Node]().union(*(self.of_memory.get(_memory(tensor), ()) for tensor in _tensors(value)))

    def mark(self, value: Any, node: Node) -> None:
        """Say that the tensors in `value` are the output of a node."""
        for tensor in _tensors(value):
            self.of_memory[_memory(tensor)] = frozenset([node])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for _, leaf in named_leaves(value) if isinstance(leaf, Tensor)]


@dataclass
class _Pass:
    """What one forward pass shows.

    Attributes:
        samples: their number.
        inputs: for each call of a unit the leaves of its inputs, by name.
        outputs: what each node returned, as a copy.
        completed: the nodes in the order in which they completed.
        origins: for each call of a unit the nodes that its inputs are computed from.
        output_origins: for each node those that its output is computed from.
        inside: for each node the nodes that completed within it.
        same: for modules that return the output of a node inside as it is: that node.
        result: what the network returned.
    """

    samples: int
    inputs: dict[Node, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[Node, Any] = field(default_factory=dict)
    completed: list[Node] = field(default_factory=list)
    origins: dict[Node, frozenset[Node]] = field(default_factory=dict)
    output_origins: dict[Node, frozenset[Node]] = field(default_factory=dict)
    inside: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    same: dict[Node, Node] = field(default_factory=dict)
    result: Tensor | None = None


class _Trace:
    """Forward passes on a few samples with all calls of units, and of the modules around them, recorded.

    Args:
        model: the network.
        units: the paths of the units.
        never_cached: paths of modules around units whose output cannot be cached.
        data: the samples.
        device: where the network is.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[str],
        never_cached: set[str],
        data: CalibrationData,
        device: torch.device,
    ) -> None:
        self.model, self.data, self.device, self.units = model, data, device, units
        self.modules = dict(model.named_modules())
        self.watched = [*units, *(_modules_around(units) - never_cached)]
        self.index = data.alike(MORE)
        self.more, self.few = self._record(MORE), self._record(FEW)
        self.forms: dict[Node, CallForm] = {}

    @torch.no_grad()
    def _record(self, samples: int) -> _Pass:
        """A pass on `samples` samples."""
        seen, counts, origins = _Pass(samples), Counter[str](), _Origins()
        running: list[list[Node]] = []  # for each module that runs now the nodes that completed within it
        given: dict[int, tuple[Any, list[int], Node]] = {}  # what nodes returned, with the versions of its tensors

        def recorded(path: str) -> Callable[..., Any]:
            original = self.modules[path].forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                node = (path, counts[path])
                counts[path] += 1
                if path in self.units:
                    seen.inputs[node] = {name: _kept(leaf, samples) for name, leaf in named_leaves([args, kwargs])}
                    seen.origins[node] = origins.of([args, kwargs])
                running.append([])
                output = original(*args, **kwargs)
                seen.inside[node] = tuple(running.pop())
                for outer in running:
                    outer.append(node)
                seen.completed.append(node)
                seen.output_origins[node] = origins.of(output)
                _, versions, inner = given.get(id(output), (None, [], None))
                if inner is not None and path not in self.units and _versions(output) == versions:
                    seen.same[node] = inner
                    return output
                seen.outputs[node] = map_leaves(lambda leaf: _copied(leaf, samples, samples == FEW), output)
                output = map_leaves(_cloned, output)  # what follows may change it in place
                origins.mark(output, node)
                if _tensors(output):
                    given[id(output)] = output, _versions(output), node
                return output

            return forward

        with replaced_forwards({self.modules[path]: recorded(path) for path in self.watched}), origins:
            seen.result = self.data.run(self.model, self.index[:samples], self.device)
        return seen

    def find_wrong(self) -> dict[str, str]:
        """The paths of units, and of modules around them, that cannot be cached, and why.

        Raises:
            RuntimeError: units that are not reached.
        """
        reached = {path for path, _ in self.few.completed}
        if missing := [unit for unit in self.units if unit not in reached]:
            raise RuntimeError(
                f"units never reached by a forward pass: {', '.join(missing)}; expected them among `keep`"
            )
        wrong: dict[str, str] = {}
        for path in self.watched:
            nodes = [node for node in self.few.completed if node[0] == path and node not in self.few.same]
            try:
                if len(nodes) != sum(node[0] == path and node not in self.more.same for node in self.more.completed):
                    raise _WrongForm("is not called equally often for all samples")
                self.forms |= {node: self._form(node) for node in nodes}
            except _WrongForm as reason:
                wrong[path] = str(reason)
        return wrong or self._find_effects()

    def _form(self, node: Node) -> CallForm:
        inputs: list[SampleAxis | SampleCount | None] = []
        if node[0] in self.units:
            few, more = self.few.inputs[node], self.more.inputs[node]
            if list(few) != list(more):
                raise _WrongForm("is not called in the same way for all samples")
            inputs = [_axis(leaf, more[name]) for name, leaf in few.items()]
            if not any(isinstance(axis, SampleAxis) for axis in inputs):
                raise _WrongForm("takes no tensor with a part for each sample")
        output, others = self.few.outputs[node], [leaf for _, leaf in named_leaves(self.more.outputs[node])]
        if len(list(named_leaves(output))) != len(others):
            raise _WrongForm("does not return the same for all samples")
        parts: list[OutputPart] = []

        def part(leaf: Any) -> Any:
            axis = _axis(leaf, others.pop(0))
            if not isinstance(axis, SampleAxis):
                return leaf
            shape, size = axis.to_rows(leaf).shape[1:], leaf.float().square().mean().sqrt().item()
            parts.append(
                OutputPart(len(parts), axis, tuple(shape), leaf.dtype, size if 0 < size < float("inf") else 1.0)
            )
            return parts[-1]

        form = CallForm(tuple(inputs), map_leaves(part, output))
        if not any(found.dtype.is_floating_point for found in parts):
            raise _WrongForm("returns no tensor with a part for each sample")
        return form

    def _find_effects(self) -> dict[str, str]:
        """The paths of modules with other effects than their output: without them the network returns other values."""
        depth, reached = Counter[str](), list(dict.fromkeys(path for path, _ in self.few.completed))
        for outer in self.few.completed:
            depth.update({path for path, _ in self.few.inside[outer]} - {outer[0]})
        wrong: set[str] = set()
        for level in sorted({depth[path] for path in self.watched}):
            paths = [path for path in reached if depth[path] == level]
            # Every second one first: whatever one of them does to its neighbors is seen.
            if not all(self._can_replace(paths[first::2]) for first in (0, 1)):
                wrong.update(*(self._effective(half) for half in _halves(paths)))
        return dict.fromkeys(sorted(wrong), "changes more than what it returns")

    def _effective(self, paths: list[str]) -> list[str]:
        """Which of some modules have effects on the others."""
        if self._can_replace(paths):
            return []
        if len(paths) == 1:
            return paths
        middle = len(paths) // 2
        return self._effective(paths[:middle]) + self._effective(paths[middle:])

    @torch.no_grad()
    def _can_replace(self, paths: Iterable[str]) -> bool:
        """Whether all others return the same if modules return what they did before, and do not run."""
        counts, replaced = Counter[str](), set(paths)

        def compared(path: str) -> Callable[..., Any]:
            original = self.modules[path].forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                node = (path, counts[path])
                counts[path] += 1
                expected = self.few.outputs[self.few.same.get(node, node)]
                if path in replaced:
                    counts.update(inner for inner, _ in self.few.inside[node])
                    return map_leaves(_cloned, expected)
                output = original(*args, **kwargs)
                if not all(map(_close, _tensors(output), _tensors(expected))):
                    raise _WrongForm("returns other values")
                return output

            return forward

        try:
            with replaced_forwards({self.modules[path]: compared(path) for path in self.watched}):
                found = self.data.run(self.model, self.index[:FEW], self.device)
        except Exception as error:
            log.debug("%s", error)
            return False
        assert self.few.result is not None  # set by the pass
        return _close(found, self.few.result)

    def order(self, left_out: dict[str, str]) -> ExecutionOrder:
        """The result, after `find_wrong` has found nothing."""
        units = list(dict.fromkeys(path for path, _ in self.few.completed if path in self.units))
        calls = Counter(path for path, _ in self.few.completed)
        dependencies = Dependencies(
            units,
            {unit: calls[unit] for unit in units},
            self.few.origins,
            self.few.output_origins,
            self.few.inside,
            self.few.same,
        )
        elements_in = {
            node: sum(
                leaf.numel // FEW
                for leaf, axis in zip(leaves.values(), self.forms[node].inputs, strict=True)
                if isinstance(axis, SampleAxis)
            )
            for node, leaves in self.few.inputs.items()
        }
        elements_out = {
            node: sum(torch.Size(part.shape).numel() for part in form.parts) for node, form in self.forms.items()
        }
        last_use, peak = plan(dependencies, elements_in, elements_out)
        return ExecutionOrder(units, left_out, self.forms, dependencies, last_use, peak)


class _WrongForm(Exception):
    """A module cannot be a unit, or its output cannot be cached."""


@dataclass(frozen=True)
class _Seen(Placeholder):
    """A tensor that was seen; its values only if the samples do not simply come first."""

    shape: torch.Size
    value: Tensor | None

    @property
    def numel(self) -> int:
        return self.shape.numel()


def _kept(leaf: Any, samples: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    return _Seen(leaf.shape, None if len(leaf) == samples else leaf.clone())


def _copied(leaf: Any, samples: int, whole: bool) -> Any:
    return _cloned(leaf) if whole else _kept(leaf, samples)


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _versions(value: Any) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in _tensors(value)]


def _axis(few: Any, more: Any) -> SampleAxis | SampleCount | None:
    """Where the samples are in a leaf, from its forms for two numbers of samples."""
    if isinstance(few, int) and isinstance(more, int) and not isinstance(few, bool) and few != more:
        return SampleCount(few // FEW) if few % FEW == 0 and few * MORE == more * FEW else None
    if not isinstance(few, _Seen | Tensor) or not isinstance(more, _Seen | Tensor) or few.shape == more.shape:
        return None
    if len(few.shape) != len(more.shape):
        raise _WrongForm("has tensors with other dimensions for other samples")
    dims = [dim for dim, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if a != b]
    fold, rest = divmod(few.shape[dims[0]], FEW)
    if len(dims) > 1 or rest or fold * MORE != more.shape[dims[0]]:
        raise _WrongForm(f"has tensors of shape {tuple(few.shape)} for {FEW} samples, {tuple(more.shape)} for {MORE}")
    for axis in [SampleAxis(dims[0], fold, interleaved) for interleaved in (False, True)]:
        a, b = (leaf.value if isinstance(leaf, _Seen) else leaf for leaf in (few, more))
        if fold == 1 or a is None or b is None or _close(axis.to_rows(a), axis.to_rows(b)[:FEW]):
            return axis
    raise _WrongForm(f"has tensors of shape {tuple(few.shape)} for {FEW} samples, which mix the samples")


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree, up to TOLERANCE of the largest value."""
    if found.shape != expected.shape:
        return False
    difference, largest = (found.float() - expected.float()).abs(), expected.float().abs().amax()
    return not bool((difference > TOLERANCE * largest).any())


def _halves(paths: Sequence[str]) -> list[list[str]]:
    """Parts of `paths`, so that of any two of them each is in a part without the other."""
    halves = [list(paths)]
    for bit in range(max(1, (len(paths) - 1).bit_length())):
        halves += [[path for i, path in enumerate(paths) if (i >> bit) % 2 == value] for value in (0, 1)]
    return [half for half in halves if half]


def _modules_around(units: Sequence[str]) -> set[str]:
    """The modules that contain units, are no units and lie in none; the network itself is not among them."""
    found: set[str] = set()
    for unit in units:
        parents = unit.split(".")[:-1]
        found |= {".".join(parents[: length + 1]) for length in range(len(parents))}
    return {path for path in found - set(units) if not any(is_inside(path, unit) for unit in units)}
