"""Layouts of calibration files. Unambiguous layouts are converted to the published one, others are refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdiff.errors import CheckpointError

Value = Tensor | list["Value"]


class Layout:
    """Converts the content of a file to lists over time steps: xs [N, C, H, W], ts [N], cs and ucs [N, L, D].

    Args:
        path: the file, for messages.
        shape: (C, H, W) of a sample.
        context_dim: D, for guided networks; None: the width of the contexts is not checked.
    """

    def __init__(self, path: str | Path, shape: Sequence[int], context_dim: int | None) -> None:
        self.path, self.shape, self.context_dim = path, tuple(shape), context_dim

    def read(self, content: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Convert the entries of a file, each to a list over time steps.

        Args:
            content: the entries xs and ts; for guided networks cs and ucs too.

        Raises:
            CheckpointError: the layout has no meaning or several meanings, samples have different shapes, or an entry
                holds values that are not numbers.
        """
        xs = self._sample_tensors("xs", content["xs"], dims=1 + len(self.shape))
        if isinstance(xs, Tensor):
            return self._group_by_time(xs, content)
        counts = [len(x) for x in xs]
        ts = self._times(content["ts"], counts)
        entries = {"xs": xs, "ts": ts}
        for name in ("cs", "ucs"):
            if name in content:
                entries[name] = self._contexts(name, content[name], counts)
        if self._is_by_trajectory(ts):
            entries = {name: list(torch.stack(part).transpose(0, 1).contiguous()) for name, part in entries.items()}
        return entries

    def validate(self, entries: Mapping[str, list[Tensor]]) -> None:
        """Check types, shapes, values, and that every time step has the same number of samples.

        The sample of trajectory k stands at index k of every time step.

        Args:
            entries: the result of `read`.

        Raises:
            CheckpointError: the first entry that the network cannot be calibrated with.
        """
        for name, tensors in entries.items():
            for tensor in tensors:
                self._validate_tensor(name, tensor)
        counts = {len(x) for x in entries["xs"]}
        if len(counts) > 1 or 0 in counts:
            raise self._error(
                f"time steps with {min(counts)} to {max(counts)} samples: expected the same number in each, "
                "sample k from trajectory k"
            )
        if "cs" in entries and len({tensor.shape[1] for name in ("cs", "ucs") for tensor in entries[name]}) > 1:
            raise self._error("contexts of different lengths: expected the same number of tokens in all of cs and ucs")

    def _validate_tensor(self, name: str, tensor: Tensor) -> None:
        """Check the type, the values and the shape of an entry at one time step."""
        if not (tensor.is_floating_point() or name == "ts") or tensor.is_complex():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise self._error(f"{name} holds {dtype} values: expected floating-point ones")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise self._error(f"damaged: {name} holds values that are not finite numbers")
        if name == "xs" and tuple(tensor.shape[1:]) != self.shape:
            raise self._error(f"samples of shape {tuple(tensor.shape[1:])}: expected {self.shape}")
        if name == "ts" and (tensor < 0).any():
            raise self._error(f"ts holds {tensor.min():g}: expected time steps of 0 or more")
        if name in ("cs", "ucs") and self.context_dim is not None and tensor.shape[2] != self.context_dim:
            raise self._error(f"contexts of width {tensor.shape[2]} in {name}: expected {self.context_dim}")

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    @staticmethod
    def _is_by_trajectory(ts: list[Tensor]) -> bool:
        """Whether the outer list is over trajectories: each item has different times, and all items the same times."""
        differ_inside = all(len(t) > 1 and len(t.unique()) == len(t) for t in ts)
        return differ_inside and len(ts) > 1 and all(torch.equal(t, ts[0]) for t in ts)

    def _sample_tensors(self, name: str, value: Any, dims: int, single: bool = True) -> Tensor | list[Tensor]:
        """Convert an entry to one tensor of all samples, or to a list of such tensors.

        Args:
            name: the entry.
            value: its content.
            dims: the number of dimensions of such a tensor.
            single: the items of a list may be single samples.
        """
        value = self._to_tensors(name, value)
        if isinstance(value, Tensor):
            value = list(value) if value.dim() == dims + 1 else value
        elif single and value and all(isinstance(item, Tensor) and item.dim() == dims - 1 for item in value):
            value = self._stack(name, value)
        elif all(isinstance(item, list) for item in value):
            value = [self._stack(name, item) for item in value]
        items = [value] if isinstance(value, Tensor) else value
        if not items:
            raise self._error(f"{name} is empty")
        for item in items:
            if not isinstance(item, Tensor) or item.dim() != dims:
                found = f"a tensor of shape {list(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
                raise self._error(
                    f"{name} holds {found}: expected tensors of {dims} dimensions, one for each time step"
                )
        return value

    def _to_tensors(self, name: str, value: Any) -> Value:
        """Convert arrays, numbers and nested lists of numbers to tensors. A list of tensors stays a list."""
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind not in "fiu":
                raise self._error(f"{name} holds an array of {value.dtype}: expected numbers")
            return torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return torch.tensor(value)
        if not isinstance(value, list | tuple):
            raise self._error(f"{name} holds {type(value).__name__}: expected tensors")
        if _has_only_numbers(value):
            try:
                return torch.tensor(value)
            except (ValueError, TypeError):
                raise self._error(f"{name} holds nested lists of different lengths") from None
        return [self._to_tensors(name, item) for item in value]

    def _stack(self, name: str, items: list) -> Tensor:
        """Stack samples, which must be tensors of one shape."""
        shapes = {tuple(item.shape) if isinstance(item, Tensor) else None for item in items}
        if len(shapes) != 1 or None in shapes:
            raise self._error(f"{name} holds samples of different shapes: {sorted(map(str, shapes))[:2]}")
        return torch.stack(items)

    def _flat_times(self, value: Value) -> list[Tensor]:
        """The items of the entry ts, each as a tensor of one dimension."""
        items = [value] if isinstance(value, Tensor) and not value.dim() else value
        return [item.flatten() if isinstance(item, Tensor) else self._stack("ts", item).flatten() for item in items]

    def _times(self, value: Any, counts: list[int]) -> list[Tensor]:
        """The time of every sample.

        Args:
            value: one time for each sample, one for each time step, or the times of all samples in one tensor.
            counts: the number of samples of each time step.
        """
        ts = self._flat_times(self._to_tensors("ts", value))
        if len(ts) == sum(counts) != len(counts) and all(len(t) == 1 for t in ts):
            ts = list(torch.cat(ts).split(counts))  # the samples of all time steps, one after another
        if len(ts) != len(counts):
            raise self._error(f"lists of different lengths: xs has {len(counts)} time steps, ts {len(ts)}")
        ts = [t.expand(count) if len(t) == 1 else t for t, count in zip(ts, counts, strict=True)]
        for t, count in zip(ts, counts, strict=True):
            if len(t) != count:
                raise self._error(f"{count} samples with {len(t)} times: expected one time for each")
        return ts

    def _contexts(self, name: str, value: Any, counts: list[int]) -> list[Tensor]:
        """The contexts of every time step.

        Args:
            name: the entry, cs or ucs.
            value: a context for each sample, one for all samples, or the same contexts at every time step.
            counts: the number of samples of each time step.
        """
        contexts = self._sample_tensors(name, value, dims=3, single=len(counts) == 1)
        if isinstance(contexts, Tensor):
            contexts = [contexts] * len(counts)
        if len(contexts) != len(counts):
            raise self._error(f"lists of different lengths: xs has {len(counts)} time steps, {name} {len(contexts)}")
        pairs = zip(contexts, counts, strict=True)
        expanded = [context.expand(count, -1, -1) if len(context) == 1 else context for context, count in pairs]
        for context, count in zip(expanded, counts, strict=True):
            if len(context) != count:
                raise self._error(f"{len(context)} contexts in {name} for {count} samples: expected one for each")
        return expanded

    def _group_by_time(self, xs: Tensor, content: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Group samples that all stand in one tensor by their times.

        The k-th sample of each time belongs to trajectory k.

        Args:
            xs: the samples, [M, C, H, W].
            content: the other entries of the file.
        """
        value = self._to_tensors("ts", content["ts"])
        ts = torch.cat(self._flat_times([value] if isinstance(value, Tensor) else value))
        if len(ts) != len(xs):
            raise self._error(f"{len(xs)} samples with {len(ts)} times: expected one time for each")
        times = list(dict.fromkeys(ts.tolist()))  # in the order of their first samples
        groups = [(ts == time).nonzero().flatten() for time in times]
        entries = {"xs": [xs[indices] for indices in groups], "ts": [ts[indices] for indices in groups]}
        for name in ("cs", "ucs"):
            if name in content:
                (contexts,) = self._contexts(name, content[name], [len(xs)])
                entries[name] = [contexts[indices] for indices in groups]
        return entries


def _has_only_numbers(value: Any) -> bool:
    """Whether a value is a number, or a nested list of numbers without an empty list."""
    if isinstance(value, list | tuple):
        return bool(value) and all(_has_only_numbers(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool)
