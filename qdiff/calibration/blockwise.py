"""Running a network unit by unit: what goes into a unit and what comes out, without running anything twice.

A unit that is finished does not run again. Its output over all samples is cached, and a forward pass that reaches the
next unit gets the output from the cache; a module whose units are all finished is skipped as a whole. So each phase of
a calibration costs about two passes of the network over the samples (full precision and quantized), whatever the number
of units, and holds only the outputs that a later unit still needs.

A module that runs several times in a forward pass is one unit with several calls, which it is fitted on together. It
comes in the order of its first call. The inputs of its later calls are then computed by modules in the state that they
have at that time, which may be full precision, and by the unit itself before it is fitted. Once everything before a
later call is finished, the call runs again, so what follows it sees the quantized network.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.cache import Cache, CachedTensor
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.schedule import Node, Progress
from qdiff.calibration.trace import CallForm, ExecutionOrder, OutputPart, replaced_forwards
from qdiff.calls import SampleAxis, SampleCount, TensorArg, map_leaves, named_leaves, same_leaf
from qdiff.errors import NonFiniteError
from qdiff.utils.memory import halving

Index = Tensor | slice  # which samples
# called with the samples of a batch, the number of the call of a unit, and its inputs by place and by name
Visit = Callable[[Index, int, tuple[Any, Any]], None]


class _ReachedUnit(Exception):
    """The unit has run: the rest of the forward pass is not needed."""


class Variants:
    """What calls hold beside tensors with a part for each sample, where it may differ between batches of samples.

    Args:
        samples: the number of samples.
    """

    def __init__(self, samples: int) -> None:
        self.trees: list[Any] = []
        self.of_sample = torch.zeros(samples, dtype=torch.int32)

    def add(self, index: Index, tree: Any) -> None:
        """Note what a batch has: nested containers with placeholders for the tensors."""
        leaves = list(named_leaves(tree))
        for number, known in enumerate(self.trees):
            others = list(named_leaves(known))
            if len(others) == len(leaves) and all(
                name == other and same_leaf(leaf, value)
                for (name, leaf), (other, value) in zip(leaves, others, strict=True)
            ):
                self.of_sample[index] = number
                return
        self.of_sample[index] = len(self.trees)
        self.trees.append(map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree))

    def of(self, index: Index) -> Any:
        """What a batch has that was added as one, or a part of such a batch."""
        return self.trees[int(self.of_sample[index][0])]


class UnitCall:
    """How a unit is called with tensors over samples, in all its calls.

    Args:
        forms: the form of each call.
        variants: what each call holds beside the tensors.
        before_samples: called with the samples before the unit runs on a part of those that it is called with.
    """

    def __init__(
        self, forms: Sequence[CallForm], variants: Sequence[Variants], before_samples: Callable[[Index], None]
    ) -> None:
        self.forms, self.variants, self.before_samples = forms, variants, before_samples
        self.counts = [sum(isinstance(axis, SampleAxis) for axis in form.inputs) for form in forms]

    @property
    def varies(self) -> bool:
        """Whether samples of different batches must not be in one call. Then the last tensor is `labels`."""
        return any(len(variant.trees) > 1 for variant in self.variants)

    @property
    def labels(self) -> Tensor:
        """For each sample its variant in each call, and its number, [N, calls + 1]."""
        variants = [variant.of_sample for variant in self.variants]
        return torch.stack([*variants, torch.arange(len(variants[0]), dtype=torch.int32)], dim=1)

    def __call__(self, unit: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
        """What `unit` returns for some samples, as one tensor: see `comparable`."""
        if not self.varies:
            return comparable(self.forms, self._rows(unit, tensors))
        kinds, which = tensors[-1][:, :-1].unique(dim=0, return_inverse=True)
        members = [(which == kind).nonzero()[:, 0] for kind in range(len(kinds))]
        parts = []
        for member in members:
            self.before_samples(tensors[-1][member, -1].long().cpu())
            parts.append(self._rows(unit, [tensor[member] for tensor in tensors]))
        order = torch.cat(members).argsort()
        joined = [[torch.cat(rows)[order] for rows in zip(*calls, strict=True)] for calls in zip(*parts, strict=True)]
        return comparable(self.forms, joined)

    def output(self, unit: nn.Module, number: int, tensors: Sequence[Tensor]) -> Any:
        """What `unit` itself returns in one of its calls, for samples of one variant."""
        first = sum(self.counts[:number])
        own = tensors[first : first + self.counts[number]]
        variant = int(tensors[-1][0, number]) if self.varies else 0

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, SampleCount):
                return leaf.factor * len(own[0])
            return leaf.axis.from_rows(own[leaf.index]) if isinstance(leaf, TensorArg) else leaf

        args, kwargs = map_leaves(fill, self.variants[number].trees[variant])
        return unit(*args, **kwargs)

    def _rows(self, unit: nn.Module, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        outputs = [self.output(unit, number, tensors) for number in range(len(self.forms))]
        return [output_rows(form, output) for form, output in zip(self.forms, outputs, strict=True)]


def output_rows(form: CallForm, output: Any) -> list[Tensor]:
    """The floating-point tensors among an output that have a part for each sample, with the samples first."""
    leaves = zip(named_leaves(form.output), named_leaves(output), strict=True)
    return [
        part.axis.to_rows(leaf)
        for (_, part), (_, leaf) in leaves
        if isinstance(part, OutputPart) and part.dtype.is_floating_point
    ]


def comparable(forms: Sequence[CallForm], calls: Sequence[Sequence[Tensor]]) -> Tensor:
    """One tensor that stands for all outputs of a unit, to compare the unit with another.

    One tensor stays as it is, with the samples first. Tensors of several calls come one after the other. Several
    tensors of a call become one, [N, elements], each divided by its size: it counts in proportion to its elements.

    Args:
        forms: the form of each call.
        calls: for each call the tensors that `output_rows` gives.
    """
    if all(len(tensors) == 1 for tensors in calls) and len({tensors[0].shape for tensors in calls}) == 1:
        folded = [part.axis.fold > 1 for part in forms[0].parts if part.dtype.is_floating_point]
        tensors = [only.flatten(0, 1) if folded[0] else only for (only,) in calls]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return torch.cat(
        [
            tensor.flatten(1) / part.size
            for form, tensors in zip(forms, calls, strict=True)
            for part, tensor in zip([p for p in form.parts if p.dtype.is_floating_point], tensors, strict=True)
        ],
        dim=1,
    )


class StoredOutput:
    """What a module returns in one of its calls, over all samples.

    Args:
        form: the form of the call.
        samples: their number.
        cache: room for it.
    """

    def __init__(self, form: CallForm, samples: int, cache: Cache) -> None:
        self.form, self.variants = form, Variants(samples)
        self.tensors = [cache.reserve((samples, *part.shape), part.dtype) for part in form.parts]

    def write(self, index: Index, output: Any) -> None:
        """Store what the module returned for some samples.

        Raises:
            ValueError: the output has another form than in the trace.
        """
        parts = iter([part for _, part in named_leaves(self.form.output)])

        def take(leaf: Any) -> Any:
            part = next(parts)
            if isinstance(part, OutputPart):
                self.tensors[part.index].write(index, part.axis.to_rows(leaf))
                return part
            return leaf

        self.variants.add(index, map_leaves(take, output))

    def read(self, index: Index, device: torch.device) -> Any:
        """A copy of what the module returned for a batch of samples."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, OutputPart):
                return leaf.axis.from_rows(self.tensors[leaf.index].read(index, device))
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        return map_leaves(fill, self.variants.of(index))

    def rows(self, index: Index, device: torch.device) -> list[Tensor]:
        """Its floating-point tensors for some samples, with the samples first."""
        parts = self.form.parts
        return [self.tensors[part.index].read(index, device) for part in parts if part.dtype.is_floating_point]

    def release(self) -> None:
        """Give the room back."""
        for tensor in self.tensors:
            tensor.release()


class UnitOutput:
    """The outputs of a unit in all its calls, over all samples.

    Args:
        calls: the output of each call.
    """

    def __init__(self, calls: Sequence[StoredOutput]) -> None:
        self.calls = calls

    def read(self, index: Index, device: torch.device) -> Tensor:
        """The outputs for some samples, as one tensor: see `comparable`."""
        return comparable([call.form for call in self.calls], [call.rows(index, device) for call in self.calls])


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
        before_samples: Callable[[Index], None] = lambda _: None,
    ) -> None:
        self.model, self.order, self.data, self.before_samples = model, order, data, before_samples
        self.device, self.cache = device, cache
        self.batches = data.batches(batch_size)
        self.modules = dict(model.named_modules())
        self.progress = Progress(order.dependencies)
        self.stored: dict[Node, StoredOutput] = {}
        self.returned: list[StoredOutput] = []  # by `finish`, and needed by no later unit
        self.unknown: dict[torch.dtype, Tensor] = {}
        self.placeholders: dict[tuple[torch.dtype, torch.Size, SampleAxis], Tensor] = {}
        self.calls = _Calls(self)

    @torch.no_grad()
    def arguments(self, unit: str) -> tuple[UnitCall, tuple[CachedTensor, ...]]:
        """How `unit` is called, and its tensors over all samples. The caller releases them.

        Raises:
            RuntimeError: an input is not a number.
        """
        nodes = self.order.dependencies.nodes(unit)
        forms = [self.order.forms[node] for node in nodes]
        variants = [Variants(len(self.data)) for _ in nodes]
        stored: list[list[CachedTensor]] = [[] for _ in nodes]

        def store(index: Index, number: int, call: tuple[Any, Any]) -> None:
            tree, tensors = split_call(forms[number], call)
            for tensor in tensors:
                if tensor.is_floating_point() and tensor.isnan().any():
                    raise RuntimeError(
                        f"{unit}: an input is not a number: the network gives such values, or it reads numbers of "
                        "earlier units by a way that leaves no trace (`item`, another library)"
                    )
            if not stored[number]:
                shapes = [(len(self.data), *tensor.shape[1:]) for tensor in tensors]
                stored[number] += [self.cache.reserve(s, t.dtype) for s, t in zip(shapes, tensors, strict=True)]
            for place, tensor in zip(stored[number], tensors, strict=True):
                place.write(index, tensor)
            variants[number].add(index, tree)

        self._reach(unit, store)
        call = UnitCall(forms, variants, self.before_samples)
        found = [tensor for tensors in stored for tensor in tensors]
        if call.varies:
            found.append(self.cache.reserve(tuple(call.labels.shape), torch.int32))
            found[-1].write(slice(None), call.labels)
        return call, tuple(found)

    @torch.no_grad()
    def finish(self, unit: str, call: UnitCall | None = None, arguments: Sequence[CachedTensor] = ()) -> UnitOutput:
        """Run `unit` on all samples and cache its output.

        Outputs that no later unit needs are dropped; the one returned stays until the next unit is finished.

        Args:
            unit: its path.
            call: how it is called, from `arguments`; None: the network runs up to it.
            arguments: its tensors, from `arguments`.

        Raises:
            NonFiniteError: its output holds values that are not finite.
        """
        nodes, module = self.order.dependencies.nodes(unit), self.modules[unit]
        outputs = [StoredOutput(self.order.forms[node], len(self.data), self.cache) for node in nodes]

        def write(index: Index, number: int, value: Any) -> None:
            if not all(bool(torch.isfinite(rows).all()) for rows in output_rows(outputs[number].form, value)):
                raise NonFiniteError(f"{unit}: its output holds values that are not finite numbers")
            outputs[number].write(index, value)

        if call is None:
            self._reach(unit, lambda index, number, inputs: write(index, number, module(*inputs[0], **inputs[1])))
        else:

            def alone(index: Index) -> None:
                self.before_samples(index)
                tensors = [x.read(index, self.device) for x in arguments]
                for number in range(len(nodes)):
                    write(index, number, call.output(module, number, tensors))

            self._in_batches(alone)
        self._keep(unit, dict(zip(nodes, outputs, strict=True)))
        return UnitOutput(outputs)

    def _keep(self, unit: str, outputs: dict[Node, StoredOutput]) -> None:
        """Keep what later units need of the outputs of a unit, and drop what none needs any more."""
        for output in self.returned:
            output.release()
        self.stored |= {node: outputs[node] for node in self.progress.finish(unit)}
        self._drop(self.order.units.index(unit), outputs)
        self.returned = [output for output in outputs.values() if output not in self.stored.values()]

    def _drop(self, position: int, keep: Any = ()) -> None:
        for node in [node for node in self.stored if self.order.last_use[node] <= position]:
            output = self.stored.pop(node)
            self.progress.stored.discard(node)
            if node not in keep:
                output.release()

    def release(self) -> None:
        """Drop everything that is cached."""
        self._drop(len(self.order.units))
        for output in self.returned:
            output.release()
        self.returned = []

    def _in_batches(self, work: Callable[[Index], None]) -> None:
        for batch in self.batches:
            halving(lambda part: work(slice(part.start, part.stop) if isinstance(part, range) else part), batch)

    def _reach(self, unit: str, visit: Visit) -> None:
        """Run the network up to the last call of `unit` on all samples, and visit its calls."""
        required, storing = self.progress.next_pass(unit)
        new = {node: StoredOutput(self.order.forms[node], len(self.data), self.cache) for node in storing}
        forwards = self.calls.begin(unit, required, new, visit)

        def through(index: Index) -> None:
            self.calls.index = index
            self.calls.counts.clear()
            self.calls.visiting = False
            try:
                self.data.run(self.model, index, self.device)
            except _ReachedUnit:
                return
            raise RuntimeError(f"{unit}: never reached by a forward pass of the network")

        with replaced_forwards(forwards):
            self._in_batches(through)
        self.stored |= new
        self.progress.store(new)

    def placeholder(self, form: CallForm, samples: int) -> Any:
        """NaN in the place of an output that nothing needs, always in the same memory."""

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, OutputPart):
                return leaf
            shape = torch.Size((samples, *leaf.shape))
            place = (leaf.dtype, shape, leaf.axis)
            if place not in self.placeholders:
                unknown = self.unknown.get(leaf.dtype, torch.empty(0))
                if len(unknown) < shape.numel():
                    value = float("nan") if leaf.dtype.is_floating_point else 0
                    unknown = torch.full((shape.numel(),), value, dtype=leaf.dtype, device=self.device)
                    self.unknown[leaf.dtype] = unknown
                self.placeholders[place] = leaf.axis.from_rows(unknown[: shape.numel()].view(shape))
            return self.placeholders[place]

        return map_leaves(fill, form.output)


class _Calls:
    """What the calls of units, and of the modules around them, do in passes up to a unit.

    Args:
        runner: the network.

    Attributes:
        index: the samples of the pass.
        counts: how often each module was called in the pass.
        visiting: the unit is visited: nothing is replaced inside it.
    """

    unit: str
    required: set[Node]
    new: dict[Node, StoredOutput]
    visit: Visit

    def __init__(self, runner: BlockwiseRunner) -> None:
        self.runner, self.dependencies = runner, runner.order.dependencies
        self.index: Index = slice(0, 0)
        self.counts = Counter[str]()
        self.visiting = False
        self.forwards = {path: self._replacement(path) for path, _ in self.dependencies.output}

    def begin(
        self, unit: str, required: set[Node], new: dict[Node, StoredOutput], visit: Visit
    ) -> dict[nn.Module, Callable[..., Any]]:
        """Passes up to a unit begin.

        Args:
            unit: where they end.
            required: the nodes whose outputs must be right.
            new: the nodes whose outputs they store.
            visit: called at each call of the unit.

        Returns:
            what takes the place of `forward` of the modules that are called.
        """
        self.unit, self.required, self.new, self.visit = unit, required, new, visit
        self.around = self.dependencies.around[unit]
        called: set[str] = set()
        todo = list(self.dependencies.children[None])
        while todo:
            node = todo.pop()
            called.add(node[0])
            todo += self.dependencies.children[node] if self._runs(node) else []
        return {self.runner.modules[path]: self.forwards[path] for path in called}

    def _replacement(self, path: str) -> Callable[..., Any]:
        original = self.runner.modules[path].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.visiting:
                return original(*args, **kwargs)
            node = (path, self.counts[path])
            self.counts[path] += 1
            if path == self.unit:
                self._visit(node[1], (args, kwargs))
            if self._runs(node):
                output = original(*args, **kwargs)
                if node in self.new:
                    self.new[node].write(self.index, output)
                return output
            self.counts.update(inner for inner, _ in self.dependencies.inside[node])
            return self._output(self.dependencies.same.get(node, node))

        return forward

    def _visit(self, number: int, call: tuple[Any, Any]) -> None:
        is_last = number + 1 == self.dependencies.calls[self.unit]
        if not is_last:  # the unit may change its inputs in place, and runs once more
            call = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
        self.visiting = True
        self.visit(self.index, number, call)
        self.visiting = False
        if is_last:
            raise _ReachedUnit

    def _runs(self, node: Node) -> bool:
        if node in self.around or node not in self.dependencies.output:
            return True
        source = self.dependencies.same.get(node, node)
        return source in self.required and source not in self.runner.stored

    def _output(self, node: Node) -> Any:
        if node in self.required:
            return self.runner.stored[node].read(self.index, self.runner.device)
        samples = self.index.stop - self.index.start if isinstance(self.index, slice) else len(self.index)
        return self.runner.placeholder(self.runner.order.forms[node], samples)


def split_call(form: CallForm, call: tuple[Any, Any]) -> tuple[Any, list[Tensor]]:
    """The inputs of a call with placeholders, and its tensors with a part for each sample, the samples first."""
    tensors: list[Tensor] = []
    kinds = iter(form.inputs)

    def place(leaf: Any) -> Any:
        kind = next(kinds)
        if not isinstance(kind, SampleAxis):
            return leaf if kind is None else kind
        tensors.append(kind.to_rows(leaf))
        return TensorArg(len(tensors) - 1, kind)

    return map_leaves(place, list(call)), tensors
