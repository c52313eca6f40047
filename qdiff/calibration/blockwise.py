"""Running a network unit by unit: what goes into a unit and what comes out, without running anything twice.

A unit that is finished does not run again. Its output over all samples is cached, and a forward pass that reaches the
next unit gets the output from the cache. So each phase of a calibration costs two passes of the network over the
samples (full precision and quantized), whatever the number of units, and holds only the outputs that a later unit
still needs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qdiff.calibration.batches import in_batches
from qdiff.calibration.cache import Cache, CachedTensor
from qdiff.calibration.data import CalibrationData
from qdiff.errors import NonFiniteError
from qdiff.model import is_inside

NO_UNIT = ": cannot be a unit; expected the module around it among `blocks`, or the layer among `keep`"


@dataclass(frozen=True)
class TensorArg:
    """Stands for a tensor among the arguments of a unit; `index` is its place among the tensors."""

    index: int


@dataclass(frozen=True)
class CallSpec:
    """How a unit is called: a `TensorArg` for each tensor, everything else as a constant."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple["CallSpec", list[Tensor]]:
        """The call with these arguments, and its tensors in order."""
        tensors: list[Tensor] = []

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value
            tensors.append(value)
            return TensorArg(len(tensors) - 1)

        call = cls(tuple(place(value) for value in args), {name: place(value) for name, value in kwargs.items()})
        return call, tensors

    def __call__(self, unit: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
        """Call `unit` with these tensors."""

        def fill(value: Any) -> Any:
            return tensors[value.index] if isinstance(value, TensorArg) else value

        return unit(*(fill(value) for value in self.args), **{name: fill(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class ExecutionOrder:
    """The units in the order in which they complete, and how long each output is needed.

    Attributes:
        units: the paths of the units, in order.
        last_use: for each unit the position of the last unit whose input needs its output; its own if none does.
        peak_elements: the most elements of one sample that are cached at once, inputs and outputs.
    """

    units: list[str]
    last_use: dict[str, int]
    peak_elements: int


class _ReachedUnit(Exception):
    """The unit has run: the rest of the forward pass is not needed."""


@contextmanager
def _replaced(model: nn.Module, forwards: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Give modules another `forward` inside the `with`."""
    modules = {path: model.get_submodule(path) for path in forwards}
    own = {path: module.__dict__["forward"] for path, module in modules.items() if "forward" in module.__dict__}
    try:
        for path, module in modules.items():
            module.forward = forwards[path]
        yield
    finally:
        for path, module in modules.items():
            module.__dict__.pop("forward", None)
            if path in own:
                module.forward = own[path]


def trace_execution(
    model: nn.Module, units: Sequence[str], data: CalibrationData, device: torch.device
) -> ExecutionOrder:
    """Trace one forward pass on two samples: in which order units run, and which needs the output of which.

    Args:
        model: the network.
        units: paths of the units, in any order.
        data: the samples.
        device: where the network is.

    Raises:
        RuntimeError: a unit is not reached, runs more than once, takes tensors inside other arguments, or does not
            return one tensor with the samples first.
    """
    order: list[str] = []
    needs: dict[str, set[str]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    leaves: dict[int, str] = {}
    alive: list[Tensor] = []  # leaves are known by their identity, so none may be freed

    def traced(path: str) -> Callable[..., Tensor]:
        original = model.get_submodule(path).forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            _, tensors = CallSpec.of(args, kwargs)
            if path in needs:
                raise RuntimeError(f"{path}: runs more than once in a forward pass{NO_UNIT}")
            if any(_holds_tensors(value) for value in [*args, *kwargs.values()] if not isinstance(value, Tensor)):
                raise RuntimeError(f"{path}: takes tensors inside a list, tuple or dict{NO_UNIT}")
            needs[path] = {leaves[leaf] for tensor in tensors for leaf in _leaves_of(tensor) if leaf in leaves}
            output = original(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise RuntimeError(f"{path}: returns {type(output).__name__} and no tensor{NO_UNIT}")
            if wrong := [tuple(tensor.shape) for tensor in [*tensors, output] if not tensor.dim() or len(tensor) != 2]:
                raise RuntimeError(
                    f"{path}: a tensor of shape {wrong[0]} for 2 samples, which do not come first{NO_UNIT}"
                )
            order.append(path)
            sizes[path] = (sum(tensor.numel() for tensor in tensors) // 2, output.numel() // 2)
            leaf = output.detach().requires_grad_()
            alive.append(leaf)
            leaves[id(leaf)] = path
            return leaf.clone()  # a copy, so that what follows may change it in place

        return forward

    two = data[:2] if len(data) > 1 else tuple(torch.cat([part, part]) for part in data[:1])
    with torch.enable_grad(), _replaced(model, {path: traced(path) for path in units}):
        output = model(*(part.to(device) for part in two))
    if not isinstance(output, Tensor):
        raise RuntimeError(f"the network returns {type(output).__name__}: expected one tensor (wrap the network)")
    if missing := [unit for unit in units if unit not in order]:
        raise RuntimeError(
            f"units never reached by a forward pass: {', '.join(missing[:3])}; expected them among `keep`"
        )
    position = {unit: i for i, unit in enumerate(order)}
    last_use = {
        unit: max([i, *(position[user] for user in order if unit in needs[user])]) for unit, i in position.items()
    }
    cached = [
        sizes[unit][0] + 2 * sum(sizes[other][1] for other in order[: i + 1] if last_use[other] >= i)
        for i, unit in enumerate(order)
    ]
    return ExecutionOrder(order, last_use, max(cached))


def _holds_tensors(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(part, Tensor) or _holds_tensors(part) for part in parts)


def _leaves_of(tensor: Tensor) -> set[int]:
    """The identities of the leaf tensors that `tensor` was computed from."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    found: set[int] = set()
    seen: set[torch.autograd.graph.Node] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return found


class BlockwiseRunner:
    """One network, run unit by unit over all samples.

    Args:
        model: the network.
        order: its units.
        data: the samples.
        batch_size: samples of one pass. It is fixed, because the last bits of an output depend on it.
        device: where the network is.
        cache: room for outputs and inputs.
        before_samples: called with the samples before a unit runs on them by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        order: ExecutionOrder,
        data: CalibrationData,
        batch_size: int,
        device: torch.device,
        cache: Cache,
        before_samples: Callable[[slice], None] = lambda _: None,
    ) -> None:
        self.model, self.order, self.data, self.before_samples = model, order, data, before_samples
        self.batch_size, self.device, self.cache = batch_size, device, cache
        self.outputs: dict[str, CachedTensor] = {}
        # with the shape and the type of one sample of the output
        self.finished: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.nan = torch.empty(0)

    @torch.no_grad()
    def arguments(self, unit: str) -> tuple[CallSpec, tuple[CachedTensor, ...]]:
        """How `unit` is called, and its tensors over all samples. The caller releases them.

        Raises:
            RuntimeError: an input is not a number, or the call is not the same for all samples.
        """
        calls: list[CallSpec] = []
        stored: list[CachedTensor] = []

        def store(start: int, call: CallSpec, tensors: list[Tensor]) -> None:
            calls.append(call)
            if call != calls[0]:
                raise RuntimeError(
                    f"{unit}: is called with {call} after {calls[0]}: "
                    "what is no tensor must be the same for all samples"
                )
            if not stored:
                stored.extend(
                    self.cache.reserve((len(self.data), *tensor.shape[1:]), tensor.dtype) for tensor in tensors
                )
            for place, tensor in zip(stored, tensors, strict=True):
                if tensor.is_floating_point() and tensor.isnan().any():
                    raise RuntimeError(
                        f"{unit}: an input is not a number: it comes from an earlier unit by a way that leaves no "
                        "gradient (detach, no_grad, checkpointing), or the network itself gives such values"
                    )
                place.write(start, tensor)

        self._reach(unit, store)
        return calls[0], tuple(stored)

    @torch.no_grad()
    def finish(self, unit: str, call: CallSpec | None = None, arguments: Sequence[CachedTensor] = ()) -> CachedTensor:
        """Run `unit` on all samples and cache its output.

        Outputs that no later unit needs are dropped; the one returned stays until the next unit is finished.

        Args:
            unit: its path.
            call: how it is called, from `arguments`; None: the network runs up to it.
            arguments: its tensors, from `arguments`.

        Raises:
            NonFiniteError: its output holds values that are not finite.
        """
        output: list[CachedTensor] = []
        module = self.model.get_submodule(unit)

        def run(start: int, call: CallSpec, tensors: Sequence[Tensor]) -> None:
            value = call(module, tensors)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(f"{unit}: its output holds values that are not finite numbers")
            if not output:
                output.append(self.cache.reserve((len(self.data), *value.shape[1:]), value.dtype))
            output[0].write(start, value)

        if call is None:
            self._reach(unit, run)
        else:

            def alone(part: slice) -> None:
                self.before_samples(part)
                run(part.start, call, [x.read(part, self.device) for x in arguments])

            in_batches(alone, range(len(self.data)), self.batch_size)
        self._drop(self.order.units.index(unit))
        self.outputs[unit] = output[0]
        self.finished[unit] = tuple(output[0].tensor.shape[1:]), output[0].dtype
        return output[0]

    def _dropped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """NaN in the place of an output that is not cached any more, always in the same memory."""
        size = torch.Size(shape).numel()
        if len(self.nan) < size:
            self.nan = torch.full((size,), float("nan"), device=self.device)
        return self.nan[:size].view(shape).to(dtype)

    def _drop(self, position: int) -> None:
        for unit in [unit for unit in self.outputs if self.order.last_use[unit] <= position]:
            self.outputs.pop(unit).release()

    def release(self) -> None:
        """Drop everything that is cached."""
        self._drop(len(self.order.units))

    def _reach(self, unit: str, visit: Callable[[int, CallSpec, list[Tensor]], None]) -> None:
        """Run the network up to `unit` on all samples; call `visit` with a batch's first index and what goes in."""
        module, span = self.model.get_submodule(unit), slice(0, 0)
        handle: RemovableHandle | None = None

        def cached(path: str) -> Callable[..., Tensor]:
            def forward(*_: Any, **__: Any) -> Tensor:
                if path in self.outputs:
                    return self.outputs[path].read(span, self.device)
                shape, dtype = self.finished[path]
                return self._dropped((span.stop - span.start, *shape), dtype)

            return forward

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert handle is not None  # this hook runs only while it is registered
            handle.remove()  # so that `visit` can run the unit
            visit(span.start, *CallSpec.of(args, kwargs))
            raise _ReachedUnit

        def through(part: slice) -> None:
            nonlocal handle, span
            span = part
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            try:
                with _replaced(self.model, forwards):
                    self.data.run(self.model, part, self.device)
            except _ReachedUnit:
                return
            finally:
                handle.remove()
            raise RuntimeError(f"{unit}: never reached by a forward pass of the network")

        forwards = {path: cached(path) for path in self.finished if not is_inside(path, unit)}
        in_batches(through, range(len(self.data)), self.batch_size)
