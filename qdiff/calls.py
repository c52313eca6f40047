"""Calls of networks and of modules inside them: nested arguments, the time step among them, the output that counts."""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

# what denoisers call the time step or the noise level, which is a time as well (EDM, arXiv 2206.00364)
TIME_NAMES = ("t", "timestep", "timesteps", "time", "time_step", "time_steps", "ts", "sigma", "noise_labels")


class Placeholder:
    """Stands for a value among the arguments of a call. It is a leaf."""


@dataclass(frozen=True)
class SampleAxis:
    """Where the samples are in a tensor.

    Attributes:
        dim: the dimension that runs over the samples.
        fold: how many entries of that dimension belong to one sample (frames or windows of video and window attention).
        interleaved: the entries of a sample are apart: entry `i` of all samples comes before entry `i + 1` of any.
    """

    dim: int = 0
    fold: int = 1
    interleaved: bool = False

    def to_rows(self, tensor: Tensor) -> Tensor:
        """The samples first, [N, ...]; [N, fold, ...] if several entries belong to a sample."""
        rows = tensor.movedim(self.dim, 0) if self.dim else tensor
        if self.fold == 1:
            return rows
        if self.interleaved:
            return rows.unflatten(0, (self.fold, -1)).transpose(0, 1)
        return rows.unflatten(0, (-1, self.fold))

    def from_rows(self, rows: Tensor) -> Tensor:
        """Undo `to_rows`."""
        if self.fold > 1:
            rows = (rows.transpose(0, 1) if self.interleaved else rows).flatten(0, 1)
        return rows.movedim(0, self.dim) if self.dim else rows


@dataclass(frozen=True)
class TensorArg(Placeholder):
    """Stands for a tensor with a part for each sample.

    Attributes:
        index: its place among the tensors.
        axis: where its samples are.
    """

    index: int
    axis: SampleAxis = SampleAxis()


@dataclass(frozen=True)
class SampleCount(Placeholder):
    """Stands for a whole number that is `factor` times the number of samples."""

    factor: int


@dataclass(frozen=True)
class ScalarArg(Placeholder):
    """Stands for a number that all samples of a call share, such as the time step of a sampler.

    Attributes:
        index: its place among the tensors, which hold a value for each sample, [N].
        like: a value of the form that the network takes: a number, or a tensor with one element.
    """

    index: int
    like: Any = field(compare=False)

    def value(self, values: Tensor) -> Any:
        """The number in `values`, which are all equal, as the network takes it."""
        if isinstance(self.like, Tensor):
            return values[0].to(self.like.dtype).reshape(self.like.shape)
        return type(self.like)(values[0].item())


def named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tuples, lists, mappings and dataclasses, with names like `added.text_embeds` or `context.1`.

    Args:
        value: anything; what is no such container is a leaf.
        name: the name of `value` itself.
    """
    items = _items(value)
    if items is None:
        yield name, value
        return
    for key, part in items:
        yield from named_leaves(part, f"{name}.{key}" if name else str(key))


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """A copy of nested containers in which `function` has replaced every leaf, in the order of `named_leaves`."""
    items = _items(value)
    if items is None:
        return function(value)
    parts = [(key, map_leaves(function, part)) for key, part in items]
    if isinstance(value, Mapping):
        # the ModelOutput of diffusers is a dict whose constructor takes its entries by name
        return type(value)(**dict(parts)) if is_dataclass(value) else type(value)(parts)  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        new = [part for _, part in parts]
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    same = copy.copy(value)
    for key, part in parts:
        object.__setattr__(same, key, part)  # the dataclass may be frozen
    return same


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container holds, with keys; None: it is a leaf."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type | Placeholder):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return None


def same_leaf(first: object, second: object) -> bool:
    """Whether two leaves are equal, tensors by their values."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def time_argument(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where the time step is among the arguments of a network.

    It is the argument whose parameter has one of TIME_NAMES, else the second positional one.

    Returns:
        The position among `args` or the name among `kwargs`; None: there is no time step.
    """
    for name in kwargs:
        if name in TIME_NAMES:
            return name
    try:
        parameters = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    for position, (_, name) in enumerate(zip(args, parameters, strict=False)):
        if name in TIME_NAMES and position > 0:
            return position
    return 1 if len(args) > 1 else None


def output_tensor(output: Any, samples: int) -> Tensor:
    """The tensor of a network's output that errors and fine-tuning compare: the first one with the samples first.

    Args:
        output: a tensor, or a tuple, list, dict or dataclass of tensors.
        samples: the number of samples.

    Raises:
        TypeError: no floating-point tensor has the samples first.
    """
    found = [leaf for _, leaf in named_leaves(output) if isinstance(leaf, Tensor)]
    for tensor in found:
        if tensor.is_floating_point() and tensor.dim() and len(tensor) == samples:
            return tensor
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found[:4]) or "no tensor"
    raise TypeError(
        f"the network returns {type(output).__name__} ({shapes}) for {samples} samples: "
        "expected a floating-point tensor with the samples first"
    )


def describe_call(
    network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shared: Collection[str] = ()
) -> dict[str, Any]:
    """Describe a call of a network, without the values of its tensors, in a form that JSON can hold.

    A tensor becomes {"shape": [null, 4, 8, 8], "dtype": "float32"}; null stands for the number of samples. A time step
    that all samples share becomes a tensor with one for each sample, which networks take as well. An object becomes
    {"class": its name}.

    Args:
        network: the network.
        args: its positional arguments.
        kwargs: its keyword arguments.
        shared: the names of keyword arguments that have no samples.

    Returns:
        {"args": a list, "kwargs": a dict}.
    """
    samples = next(
        (len(leaf) for _, leaf in named_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()), None
    )
    time = time_argument(network, args, kwargs)

    def describe(place: int | str, value: Any) -> Any:
        if place == time and (isinstance(value, int | float) or (isinstance(value, Tensor) and not value.dim())):
            return {"shape": [None], "dtype": _dtype_name(torch.as_tensor(value).dtype)}
        return _described(value, None if place in shared else samples)

    return {
        "args": [describe(place, value) for place, value in enumerate(args)],
        "kwargs": {name: describe(name, value) for name, value in kwargs.items()},
    }


def _described(value: Any, samples: int | None) -> Any:
    items = _items(value)
    if items is not None:
        parts = {str(key): _described(part, samples) for key, part in items}
        return list(parts.values()) if isinstance(value, list | tuple) else parts
    if isinstance(value, Tensor):
        shape = [None if dim == 0 and size == samples else size for dim, size in enumerate(value.shape)]
        return {"shape": shape, "dtype": _dtype_name(value.dtype)}
    return value if value is None or isinstance(value, bool | int | float | str) else {"class": type(value).__name__}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
