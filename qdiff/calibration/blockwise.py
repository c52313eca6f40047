"""Running a network unit by unit: what goes into a unit and what comes out, without running anything twice.

A unit that is finished does not run again: its output over all rows is kept, and a forward pass that
reaches the next unit gets it from there. So the whole calibration costs two passes of the network over
the rows in each phase (full precision and quantized), whatever the number of units, and holds only the outputs
that a later unit still needs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.batches import in_batches
from qdiff.calibration.cache import Cache, CachedTensor
from qdiff.calibration.data import CalibrationData
from qdiff.errors import NonFiniteError
from qdiff.model import is_inside

NO_UNIT = ": cannot be a unit; expected the module around it among `blocks`, or the layer among `keep`"


@dataclass(frozen=True)
class TensorArg:
    """The place of a tensor among the arguments of a unit."""

    index: int


@dataclass(frozen=True)
class CallSpec:
    """How a unit is called: its tensors in order, everything else as a constant."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple["CallSpec", list[Tensor]]:
        tensors: list[Tensor] = []

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value
            tensors.append(value)
            return TensorArg(len(tensors) - 1)

        call = cls(tuple(place(value) for value in args), {name: place(value) for name, value in kwargs.items()})
        return call, tensors

    def __call__(self, unit: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
        def fill(value: Any) -> Any:
            return tensors[value.index] if isinstance(value, TensorArg) else value

        return unit(*(fill(value) for value in self.args), **{name: fill(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class ExecutionOrder:
    """The units in the order in which they complete, and how long each output is needed.

    last_use: for each unit the position of the last one whose input needs its output (its own where
    none does). peak_elements: the most elements held at once for one row, inputs and outputs.
    """

    order: list[str]
    last_use: dict[str, int]
    peak_elements: int


class _Reached(Exception):
    """The unit has run: the rest of the forward pass is not needed."""


@contextmanager
def _replaced(model: nn.Module, forwards: dict[str, Callable]) -> Iterator[None]:
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
    model: nn.Module, units: Sequence[str], rows: CalibrationData, device: torch.device
) -> ExecutionOrder:
    """Trace one forward pass on two rows: which unit needs the output of which.

    Raises:
        RuntimeError: a unit is not reached, runs more than once, takes tensors inside other arguments, or does not return one
            tensor with the rows first.
    """
    order: list[str] = []
    needs: dict[str, set[str]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    leaves: dict[int, str] = {}
    keep: list[Tensor] = []  # leaves are told apart by identity

    def traced(path: str) -> Callable:
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
                raise RuntimeError(f"{path}: a tensor of shape {wrong[0]} for 2 rows, which do not come first{NO_UNIT}")
            order.append(path)
            sizes[path] = (sum(tensor.numel() for tensor in tensors) // 2, output.numel() // 2)
            leaf = output.detach().requires_grad_()
            keep.append(leaf)
            leaves[id(leaf)] = path
            return leaf.clone()  # a copy, so that what follows may change it in place

        return forward

    two = rows[:2] if len(rows) > 1 else tuple(torch.cat([part, part]) for part in rows[:1])
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
    held = [
        sizes[unit][0] + 2 * sum(sizes[other][1] for other in order[: i + 1] if last_use[other] >= i)
        for i, unit in enumerate(order)
    ]
    return ExecutionOrder(order, last_use, max(held))


def _holds_tensors(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(part, Tensor) or _holds_tensors(part) for part in parts)


def _leaves_of(tensor: Tensor) -> set[int]:
    """The identities of the leaf tensors that `tensor` was computed from."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    found, seen, todo = set(), set(), [tensor.grad_fn]
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
    """One network, run unit by unit over all rows in the order of `plan`.

    Args:
        batch_size: rows of one pass. Fixed, because the last bits of an output depend on it.
        at: told the rows before a unit runs on them by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ExecutionOrder,
        rows: CalibrationData,
        batch_size: int,
        device: torch.device,
        cache: Cache,
        at: Callable[[slice], None] = lambda _: None,
    ) -> None:
        self.model, self.plan, self.rows, self.at = model, plan, rows, at
        self.batch_size, self.device, self.cache = batch_size, device, cache
        self.outputs: dict[str, CachedTensor] = {}
        self.finished: dict[str, tuple[int, ...]] = {}  # with the shape of one row of the output
        self.dropped = torch.empty(0)

    @torch.no_grad()
    def arguments(self, unit: str) -> tuple[CallSpec, tuple[CachedTensor, ...]]:
        """How `unit` is called, and its tensors over all rows. The caller releases them.

        Raises:
            RuntimeError: an input that is not a number.
        """
        calls: list[CallSpec] = []
        stored: list[CachedTensor] = []

        def keep(start: int, call: CallSpec, tensors: list[Tensor]) -> None:
            calls.append(call)
            if call != calls[0]:
                raise RuntimeError(
                    f"{unit}: is called with {call} after {calls[0]}: what is no tensor must be the same for all rows"
                )
            if not stored:
                stored.extend(
                    self.cache.reserve((len(self.rows), *tensor.shape[1:]), tensor.dtype) for tensor in tensors
                )
            for place, tensor in zip(stored, tensors, strict=True):
                if tensor.is_floating_point() and tensor.isnan().any():
                    raise RuntimeError(
                        f"{unit}: an input is not a number: it comes from an earlier unit by a way that leaves no gradient "
                        "(detach, no_grad, checkpointing), or the network itself gives such values"
                    )
                place.write(start, tensor)

        self._reach(unit, keep)
        return calls[0], tuple(stored)

    @torch.no_grad()
    def finish(self, unit: str, call: CallSpec | None = None, arguments: Sequence[CachedTensor] = ()) -> CachedTensor:
        """Run `unit` on all rows (on its arguments, where they are at hand) and keep its output.

        Outputs that no later unit needs are dropped; the one returned stays until the next unit is finished.
        """
        output: list[CachedTensor] = []
        module = self.model.get_submodule(unit)

        def run(start: int, call: CallSpec, tensors: Sequence[Tensor]) -> None:
            value = call(module, tensors)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(f"{unit}: its output holds values that are not finite numbers")
            if not output:
                output.append(self.cache.reserve((len(self.rows), *value.shape[1:]), value.dtype))
            output[0].write(start, value)

        if call is None:
            self._reach(unit, run)
        else:

            def alone(part: slice) -> None:
                self.at(part)
                run(part.start, call, [x.read(part, self.device) for x in arguments])

            in_batches(alone, range(len(self.rows)), self.batch_size)
        self._drop(self.plan.order.index(unit))
        self.outputs[unit] = output[0]
        self.finished[unit] = tuple(output[0].tensor.shape[1:])
        return output[0]

    def _nothing(self, shape: tuple[int, ...]) -> Tensor:
        """Not a number, many times, for what is dropped; in the same memory each time, so that it costs nothing."""
        size = torch.Size(shape).numel()
        if len(self.dropped) < size:
            self.dropped = torch.full((size,), float("nan"), device=self.device)
        return self.dropped[:size].view(shape)

    def _drop(self, position: int) -> None:
        for unit in [unit for unit in self.outputs if self.plan.last_use[unit] <= position]:
            self.outputs.pop(unit).release()

    def release(self) -> None:
        """Drop everything that is kept."""
        self._drop(len(self.plan.order))

    def _reach(self, unit: str, visit: Callable[[int, CallSpec, list[Tensor]], None]) -> None:
        """Run the network on all rows up to `unit`, calling `visit` with the first row's number and what goes in."""
        span = slice(0, 0)

        def saved(path: str) -> Callable:
            def forward(*_: Any, **__: Any) -> Tensor:
                if path in self.outputs:
                    return self.outputs[path].read(span, self.device)
                return self._nothing((span.stop - span.start, *self.finished[path]))

            return forward

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handle.remove()  # so that `visit` can run the unit
            visit(span.start, *CallSpec.of(args, kwargs))
            raise _Reached

        def through(part: slice) -> None:
            nonlocal handle, span
            span = part
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            try:
                with _replaced(self.model, forwards):
                    self.model(*(tensor.to(self.device) for tensor in self.rows[part]))
            except _Reached:
                return
            finally:
                handle.remove()
            raise RuntimeError(f"{unit}: never reached by a forward pass of the network")

        module, handle = self.model.get_submodule(unit), None
        forwards = {path: saved(path) for path in self.finished if not is_inside(path, unit)}
        in_batches(through, range(len(self.rows)), self.batch_size)
