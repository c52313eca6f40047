"""Calibration files as people have them: unambiguous layouts become the published one, others are refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdiff.errors import CheckpointError

Value = Tensor | list["Value"]


class Layout:
    """One file's content on its way to lists over time steps: xs [N, C, H, W], ts [N], cs and ucs [N, L, D].

    Args:
        path: for messages. shape: (C, H, W) of a row. context_dim: D, for guided networks.
    """

    def __init__(self, path: str | Path, shape: Sequence[int], context_dim: int | None) -> None:
        self.path, self.shape, self.context_dim = path, tuple(shape), context_dim

    def error(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {words}")

    def lists(self, content: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """The parts of a file, each as a list over time steps.

        Raises:
            CheckpointError: a layout that could mean several things, or none; rows of another shape; values that are
                no numbers.
        """
        xs = self.tensors("xs", content["xs"], rows=1 + len(self.shape))
        if isinstance(xs, Tensor):
            return self.grouped(xs, content)
        ts = self.times(content["ts"], [len(x) for x in xs])
        parts = {"xs": xs, "ts": ts}
        for name in ("cs", "ucs"):
            if name in content:
                parts[name] = self.contexts(name, content[name], [len(x) for x in xs])
        if self.by_trajectory(ts):
            parts = {name: list(torch.stack(part).transpose(0, 1).contiguous()) for name, part in parts.items()}
        return parts

    @staticmethod
    def by_trajectory(ts: list[Tensor]) -> bool:
        """Whether the outer list is over trajectories, each with all time steps: times differ inside, and are the same outside."""
        inside = all(len(t) > 1 and len(t.unique()) == len(t) for t in ts)
        return inside and len(ts) > 1 and all(torch.equal(t, ts[0]) for t in ts)

    def tensors(self, name: str, value: Any, rows: int, single: bool = True) -> Tensor | list[Tensor]:
        """A tensor of all rows (`rows` dimensions), or a list of such tensors; `single`: the items of a list may be single rows."""
        value = self.numbers(name, value)
        if isinstance(value, Tensor):
            value = list(value) if value.dim() == rows + 1 else value
        elif single and value and all(isinstance(item, Tensor) and item.dim() == rows - 1 for item in value):
            value = self.stacked(name, value)  # one row an item
        elif all(isinstance(item, list) for item in value):
            value = [self.stacked(name, item) for item in value]
        items = [value] if isinstance(value, Tensor) else value
        if not items:
            raise self.error(f"{name} is empty")
        for item in items:
            if not isinstance(item, Tensor) or item.dim() != rows:
                found = f"a tensor of shape {list(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
                raise self.error(f"{name} holds {found}: expected tensors of {rows} dimensions, one for each time step")
        return value

    def numbers(self, name: str, value: Any) -> Value:
        """Tensors for arrays, numbers and nested lists of numbers; a list where a list holds tensors."""
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind not in "fiu":
                raise self.error(f"{name} holds an array of {value.dtype}: expected numbers")
            return torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return torch.tensor(value)
        if not isinstance(value, list | tuple):
            raise self.error(f"{name} holds {type(value).__name__}: expected tensors")
        if _only_numbers(value):
            try:
                return torch.tensor(value)
            except (ValueError, TypeError):
                raise self.error(f"{name} holds nested lists of different lengths") from None
        return [self.numbers(name, item) for item in value]

    def stacked(self, name: str, items: list) -> Tensor:
        shapes = {tuple(item.shape) if isinstance(item, Tensor) else None for item in items}
        if len(shapes) != 1 or None in shapes:
            raise self.error(f"{name} holds rows of different shapes: {sorted(map(str, shapes))[:2]}")
        return torch.stack(items)

    def times(self, value: Any, counts: list[int]) -> list[Tensor]:
        """One time for each row, from one for each, one for each step, or all in one tensor."""
        value = self.numbers("ts", value)
        value = [value] if isinstance(value, Tensor) and not value.dim() else value
        flat = [item.flatten() if isinstance(item, Tensor) else self.stacked("ts", item).flatten() for item in value]
        if len(flat) == sum(counts) != len(counts) and all(len(t) == 1 for t in flat):
            flat = list(torch.cat(flat).split(counts))  # all rows of all steps, one after the other
        if len(flat) != len(counts):
            raise self.error(f"lists of different lengths: xs has {len(counts)} time steps, ts {len(flat)}")
        ts = [t.expand(count) if len(t) == 1 else t for t, count in zip(flat, counts, strict=True)]
        for t, count in zip(ts, counts, strict=True):
            if len(t) != count:
                raise self.error(f"{count} rows with {len(t)} times: expected one time for each")
        return ts

    def contexts(self, name: str, value: Any, counts: list[int]) -> list[Tensor]:
        """Contexts of each step, from one for each row, one for all rows, or the same rows at every step."""
        found = self.tensors(name, value, rows=3, single=len(counts) == 1)
        if isinstance(found, Tensor):
            found = [found] * len(counts)
        if len(found) != len(counts):
            raise self.error(f"lists of different lengths: xs has {len(counts)} time steps, {name} {len(found)}")
        filled = [
            part.expand(count, -1, -1) if len(part) == 1 else part for part, count in zip(found, counts, strict=True)
        ]
        for part, count in zip(filled, counts, strict=True):
            if len(part) != count:
                raise self.error(f"{len(part)} contexts in {name} for {count} rows: expected one for each")
        return filled

    def grouped(self, xs: Tensor, content: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """All rows in one tensor [M, C, H, W]: rows of one time are a step; the k-th of each belongs to trajectory k."""
        value = self.numbers("ts", content["ts"])
        items = [value] if isinstance(value, Tensor) else value
        ts = torch.cat(
            [item.flatten() if isinstance(item, Tensor) else self.stacked("ts", item).flatten() for item in items]
        )
        if len(ts) != len(xs):
            raise self.error(f"{len(xs)} rows with {len(ts)} times: expected one time for each")
        order = list(dict.fromkeys(ts.tolist()))  # in the order of their first rows
        steps = [(ts == time).nonzero().flatten() for time in order]
        parts = {"xs": [xs[rows] for rows in steps], "ts": [ts[rows] for rows in steps]}
        for name in ("cs", "ucs"):
            if name in content:
                (whole,) = self.contexts(name, content[name], [len(xs)])
                parts[name] = [whole[rows] for rows in steps]
        return parts

    def check(self, parts: Mapping[str, list[Tensor]]) -> None:
        """Shapes, widths, finite values, and as many samples in each step: those of trajectory k stand at place k everywhere."""
        for name, steps in parts.items():
            for part in steps:
                if not (part.is_floating_point() or name == "ts") or part.is_complex():
                    kind = str(part.dtype).removeprefix("torch.")
                    raise self.error(f"{name} holds {kind} values: expected floating-point ones")
                if part.is_floating_point() and not torch.isfinite(part).all():
                    raise self.error(f"damaged: {name} holds values that are not finite numbers")
                if name == "xs" and tuple(part.shape[1:]) != self.shape:
                    raise self.error(f"rows of shape {tuple(part.shape[1:])}: expected {self.shape}")
                if name == "ts" and (part < 0).any():
                    raise self.error(f"ts holds {part.min():g}: expected time steps of 0 or more")
                if name in ("cs", "ucs") and self.context_dim is not None and part.shape[2] != self.context_dim:
                    raise self.error(f"contexts of width {part.shape[2]} in {name}: expected {self.context_dim}")
        counts = {len(x) for x in parts["xs"]}
        if len(counts) > 1 or 0 in counts:
            raise self.error(
                f"time steps with {min(counts)} to {max(counts)} samples: expected the same number in each, row k of trajectory k"
            )
        if "cs" in parts and len({part.shape[1] for name in ("cs", "ucs") for part in parts[name]}) > 1:
            raise self.error("contexts of different lengths: expected the same number of tokens in all of cs and ucs")


def _only_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_only_numbers(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool)
