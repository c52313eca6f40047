"""Calibration samples from the calls of a network, as a hook records them while sampling."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.data import CalibrationData, InputSpec
from qdiff.calls import ScalarArg, TensorArg, map_leaves, named_leaves, same_leaf, time_argument
from qdiff.errors import ConfigError

log = logging.getLogger(__name__)

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional inputs, inputs by keyword
FORMS = "expected tensors by position, a dict of inputs by keyword, or a list of calls"


def collate(inputs: object, model: nn.Module, shared: Iterable[str | int] = ()) -> CalibrationData:
    """Join the calls of a network to calibration samples.

    A tensor whose first dimension is the number of samples of its call differs between samples; any other one is shared
    by all samples. The time step, and a number that differs between calls, is kept for each sample.

    Args:
        inputs: tensors by position; a dict of inputs by keyword; or a list of calls, each a tuple of positional inputs,
            a dict, or a pair (positional inputs, dict). Inputs may be nested in dicts, lists and tuples.
        model: the network that they are for.
        shared: keywords or positions of inputs that all samples share although their first dimension is the number of
            samples.

    Raises:
        ConfigError: inputs of another form, calls that differ in more than their samples, or values that are not
            finite.
    """
    calls = _calls(inputs)
    trees = [[*args, kwargs] for args, kwargs in calls]
    columns = _columns(trees)
    joined = _Joined(columns, _find(columns, shared), time_argument(model, *calls[0]))
    leaves = iter([joined.leaf(name) for name in columns])
    *args, kwargs = map_leaves(lambda _: next(leaves), trees[0])
    joined.validate_finite()
    spec = InputSpec(tuple(args), kwargs, joined.time_index)
    data = _for_each_sample(CalibrationData(tuple(joined.tensors), joined.trajectories(), call=spec), model)
    return replace(data, call=None) if data.call == InputSpec.positional(len(data.inputs)) else data


@torch.no_grad()
def _for_each_sample(data: CalibrationData, model: nn.Module) -> CalibrationData:
    """`data` with numbers that samples share as tensors [N], if the network takes them so and returns the same.

    Batches of samples with other time steps then need one call of the network, not one for each time step.
    """
    parts = data.uniform_parts(slice(None))
    if len(parts) == 1:
        return data

    def as_tensor(leaf: Any) -> Any:
        return TensorArg(leaf.index) if isinstance(leaf, ScalarArg) else leaf

    spec = InputSpec(map_leaves(as_tensor, data.spec.args), map_leaves(as_tensor, data.spec.kwargs), data.spec.time)
    other, few = replace(data, call=spec), torch.tensor([int(torch.arange(len(data))[part][0]) for part in parts[:4]])
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = [module for module in model.modules() if module.training]
    try:
        expected, found = data.run(model.eval(), few, device), other.run(model, few, device)
        close = found.shape == expected.shape and torch.allclose(
            found, expected, 1e-3, 1e-4 * float(expected.abs().max())
        )
        return other if close else data
    except Exception as error:  # the network is foreign: whatever it raises says that it does not take them
        log.debug("time steps [N]: %s", error)
        return data
    finally:
        for module in training:
            module.training = True


def _calls(inputs: object) -> list[Call]:
    """The calls of the network in `inputs`."""
    is_list_of_calls = isinstance(inputs, list) and inputs and not isinstance(inputs[0], Tensor)
    if is_list_of_calls or not isinstance(inputs, list):
        return [_call(call) for call in (inputs if isinstance(inputs, list) else [inputs])]
    return [(tuple(inputs), {})]


def _call(call: object) -> Call:
    if isinstance(call, Mapping) and all(isinstance(name, str) for name in call):
        return (), dict(call)
    if not isinstance(call, tuple | list):
        raise ConfigError(f" of type {type(call).__name__}: {FORMS}", field="inputs")
    if len(call) == 2 and isinstance(call[0], tuple | list) and isinstance(call[1], Mapping):
        return tuple(call[0]), dict(call[1])
    return tuple(call), {}


def _columns(trees: Sequence[list[Any]]) -> dict[str, list[Any]]:
    """The leaves of the inputs by name (`0`, `context`, `added.text_embeds`), each with its values in all calls."""
    columns: dict[str, list[Any]] = {}
    for number, (*args, kwargs) in enumerate(trees):
        found = dict(named_leaves(args)) | dict(named_leaves(kwargs))
        if number and list(found) != list(columns):
            odd = next(iter(set(found) ^ set(columns)), "the order of inputs by keyword")
            raise ConfigError(f": call {number} differs from the first one in {odd}", field="inputs")
        for name, leaf in found.items():
            columns.setdefault(name, []).append(leaf.detach() if isinstance(leaf, Tensor) else leaf)
    return columns


def _find(columns: Iterable[str], keys: Iterable[str | int]) -> set[str]:
    """The names of the leaves inside the inputs `keys`, which are keywords or positions."""
    found: set[str] = set()
    for key in map(str, keys):
        inside = {name for name in columns if name == key or name.startswith(f"{key}.")}
        if not inside:
            raise ConfigError(f": no input {key}, expected one of {', '.join(columns)}", field="shared")
        found |= inside
    return found


class _Joined:
    """The inputs of several calls, joined.

    Args:
        columns: the values of each input in all calls, by name.
        shared: the names of inputs that all samples share.
        time: the position or keyword of the time step.

    Attributes:
        tensors: the inputs that differ between samples, [N, ...].
        time_index: which of them is the time step.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]], shared: set[str], time: str | int | None) -> None:
        self.columns, self.shared, self.time = columns, shared, str(time)
        self.counts = self._count_samples()
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.time_index: int | None = None

    def _count_samples(self) -> list[int]:
        """The number of samples of each call: the first dimension of the first tensor of two dimensions or more."""
        tensors = [
            values
            for name, values in self.columns.items()
            if name not in self.shared and all(isinstance(value, Tensor) and value.dim() for value in values)
        ]
        wide = [values for values in tensors if values[0].dim() > 1 and values[0].is_floating_point()]
        if not tensors:
            raise ConfigError(f" without a tensor that has the samples first: {FORMS}", field="inputs")
        return [len(value) for value in (wide or tensors)[0]]

    def leaf(self, name: str) -> Any:
        """What stands for the input `name` in the calls of calibration samples."""
        values = self.columns[name]
        if name not in self.shared and all(isinstance(value, Tensor) and value.dim() for value in values):
            if [len(value) for value in values] == self.counts:
                return TensorArg(self._add(name, values))
            if name == self.time and any(len(value) != 1 for value in values):
                lengths = sorted({*self.counts, *map(len, values)})
                raise ConfigError(f" of {lengths} samples: expected the same number in each", field="inputs")
        if name not in self.shared and all(map(_is_number, values)) and (name == self.time or not _same(values)):
            numbers = [torch.as_tensor(value).flatten() for value in values]
            repeated = [number.expand(count) for number, count in zip(numbers, self.counts, strict=True)]
            return ScalarArg(self._add(name, repeated), values[0])
        if not _same(values):
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else value for value in values]
            odd = next((other for other in shapes if str(other) != str(shapes[0])), "other values")
            raise ConfigError(
                f": {name} is {shapes[0]} in one call and {odd} in another: expected the samples first, or the same in "
                "all calls",
                field="inputs",
            )
        return values[0]

    def _add(self, name: str, values: Sequence[Tensor]) -> int:
        if other := [value for value in values if value.shape[1:] != values[0].shape[1:]]:
            shapes = f"{tuple(values[0].shape)} in one call and {tuple(other[0].shape)} in another"
            raise ConfigError(f": {name} is {shapes}: expected samples of one shape", field="inputs")
        if name == self.time:
            self.time_index = len(self.tensors)
        self.tensors.append(values[0] if len(values) == 1 else torch.cat([value.to(values[0]) for value in values]))
        self.names.append(name)
        return len(self.tensors) - 1

    def validate_finite(self) -> None:
        """Check for NaN, and for infinity in x_t and t; masks among the contexts may hold -inf."""
        for index, (name, tensor) in enumerate(zip(self.names, self.tensors, strict=True)):
            bad = torch.isnan(tensor) if index and index != self.time_index else ~torch.isfinite(tensor)
            if bad.any():
                raise ConfigError(f": {name} holds values that are not finite numbers", field="inputs")

    def trajectories(self) -> Tensor | None:
        """The number of the trajectory of each sample; None: the calls do not say.

        Calls of equal size whose time steps go on in one direction are one run of the sampler, in which a sample keeps
        its place. Samples of a run that begin with the same x_t differ in their condition alone.
        """
        if len(self.counts) == 1 or self.time_index is None:
            return None
        times = [part.float().mean().item() for part in self.tensors[self.time_index].split(self.counts)]
        first = self.tensors[0].split(self.counts)
        found: list[Tensor] = []
        total, direction = 0, 0.0
        for number, (count, start) in enumerate(zip(self.counts, first, strict=True)):
            step = times[number] - times[number - 1] if number else 0.0
            goes_on = number > 0 and count == self.counts[number - 1] and step != 0 and step * direction >= 0
            if goes_on:
                direction = step
            else:
                direction = 0.0
                places = start.flatten(1).unique(dim=0, return_inverse=True)[1] + total
                total = int(places.max()) + 1
            found.append(places.cpu())
        return torch.cat(found)


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() <= 1 and value.dtype != torch.bool
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(values: Sequence[Any]) -> bool:
    """Whether all values are equal."""
    return all(same_leaf(values[0], other) for other in values[1:])
