"""The calibration set: (x_t, t[, context]) from the model's own sampling trajectory, over all time steps."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from qdiff.calibration.file_layouts import Layout
from qdiff.checkpoint import load_object, state_hash
from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.files import atomic_write


@dataclass(frozen=True)
class CalibrationSet:
    """The published structure: a list over time steps, in the order in which sampling visits them.

    xs: [N, C, H, W] each; ts: [N] each; cs, ucs: conditional and unconditional contexts [N, L, D]
    each, for guided models only.
    """

    xs: list[Tensor]
    ts: list[Tensor]
    cs: list[Tensor] | None = None
    ucs: list[Tensor] | None = None

    def select(self, steps: int, samples: int) -> "CalibrationData":
        """`steps` time steps spread evenly, the first `samples` samples of each (`--cali_st`, `--cali_n`).

        Raises:
            CheckpointError: the set holds fewer.
        """
        if steps > len(self.ts):
            raise CheckpointError(f"--cali_st {steps}: the calibration set holds {len(self.ts)} time steps")
        if samples > len(self.xs[0]):
            raise CheckpointError(
                f"--cali_n {samples}: the calibration set holds {len(self.xs[0])} samples of each time step"
            )
        chosen = [
            len(self.ts) * i // steps for i in range(steps)
        ]  # to the end, also where `steps` does not divide their number
        x = torch.cat([self.xs[i][:samples] for i in chosen])
        t = torch.cat([self.ts[i][:samples] for i in chosen])
        trajectories = torch.arange(len(self.xs[0][:samples])).repeat(steps)
        if self.cs is None:
            return CalibrationData((x.float(), t.float()), trajectories)
        context = [torch.cat([part[i][:samples] for i in chosen]).float() for part in (self.cs, self.ucs)]
        return CalibrationData(
            (torch.cat([x, x]).float(), torch.cat([t, t]).float(), torch.cat(context)), trajectories.repeat(2)
        )


@dataclass(frozen=True)
class CalibrationData:
    """The rows that the network is calibrated on: its positional inputs, each with the rows first.

    trajectories: the number of the trajectory that each row was taken from; None: no two rows belong together.
    """

    inputs: tuple[Tensor, ...]
    trajectories: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Copies of some rows, which may be changed in place."""
        return tuple(tensor[index].clone() if isinstance(index, slice) else tensor[index] for tensor in self.inputs)

    def hash(self) -> str:
        parts = [*self.inputs, *([] if self.trajectories is None else [self.trajectories])]
        return state_hash({str(number): tensor for number, tensor in enumerate(parts)})

    def arranged(self, held_out: float, seed: int) -> tuple["CalibrationData", int]:
        """The rows in random order, those that are held out last, and where these begin.

        Whole trajectories are held out: other time steps of one, or the same with another condition, would tell about it.
        """
        generator = torch.Generator().manual_seed(seed)
        of_row = torch.arange(len(self)) if self.trajectories is None else self.trajectories
        if len(names := of_row.unique()) < 2:
            names = of_row = torch.arange(len(self))
        chosen = names[torch.randperm(len(names), generator=generator)][: max(1, int(len(names) * held_out))]
        order = torch.randperm(len(self), generator=generator)
        judges = torch.isin(of_row[order], chosen)
        order = torch.cat([order[~judges], order[judges]])
        return CalibrationData(self[order], of_row[order]), int((~judges).sum())


def check_steps(steps: int, evaluations: int) -> None:
    """ConfigError for more time steps than a sampler makes."""
    if steps > evaluations:
        raise ConfigError(f"--cali_st {steps}: the sampler makes only {evaluations} steps")


class Recorder:
    """A sampler's callback that keeps x_t and t of `steps` evaluations spread evenly over `total`."""

    def __init__(self, steps: int, total: int) -> None:
        check_steps(steps, total)
        self.keep = {
            total * i // steps for i in range(steps)
        }  # to the end of the trajectory, also where `steps` does not divide it
        self.seen = 0
        self.xs: list[Tensor] = []
        self.ts: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, eps: Tensor) -> None:
        if self.seen in self.keep:
            self.xs.append(x.detach().float().cpu().clone())
            self.ts.append(t.detach().float().cpu().clone())
        self.seen += 1


def generate(
    run_sampler: Callable[[list[int], Callable], object], steps: int, evaluations: int, samples: int, batch_size: int
) -> CalibrationSet:
    """Draw a calibration set: run the full-precision sampler and keep `steps` of its evaluations.

    Args:
        run_sampler: samples the images of the given indices, calling the callback at each evaluation.
        evaluations: how many the sampler makes for one image.
    """
    chunks = []
    for start in tqdm(
        range(0, samples, batch_size), desc="calibration set", unit="batch", disable=samples <= batch_size
    ):
        recorder = Recorder(steps, evaluations)
        run_sampler(list(range(start, min(start + batch_size, samples))), recorder)
        chunks.append(recorder)
    return CalibrationSet(
        xs=[torch.cat(parts) for parts in zip(*(chunk.xs for chunk in chunks), strict=True)],
        ts=[torch.cat(parts) for parts in zip(*(chunk.ts for chunk in chunks), strict=True)],
    )


def save_set(path: str | Path, data: CalibrationSet) -> None:
    """Write the published file: a dict of lists of tensors."""
    content = {"xs": data.xs, "ts": data.ts}
    if data.cs is not None:
        content |= {"cs": data.cs, "ucs": data.ucs}
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a path would leave its name inside
        torch.save(content, file)


def load_set(path: str | Path, shape: Iterable[int], context_dim: int | None = None) -> CalibrationSet:
    """Read a calibration file and check it against the network's input `shape` (C, H, W).

    Other layouts than the published one are taken where they can mean one thing only (`qdiff.calibration.file_layouts`).

    Args:
        context_dim: width of the contexts of a network that takes them, with and without the condition; None: it takes none.

    Raises:
        CheckpointError: not a calibration set, damaged, ambiguous, or for another network.
    """
    content = load_object(path, arrays=True)
    if not isinstance(content, dict) or not {"xs", "ts"} <= set(content):
        found = (
            f"a dict with {', '.join(map(str, list(content)[:4]))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise CheckpointError(f"{path}: expected a calibration set (a dict with xs and ts), found {found}")
    content = {name: content[name] for name in ("xs", "ts", "cs", "ucs") if content.get(name) is not None}
    expected = {"xs", "ts"} if context_dim is None else {"xs", "ts", "cs", "ucs"}
    if set(content) != expected:
        kind = "an unconditional" if context_dim is None else "a guided"
        raise CheckpointError(
            f"{path}: expected {', '.join(sorted(expected))} for {kind} network, found {', '.join(sorted(content))}"
        )
    layout = Layout(path, tuple(shape), context_dim)
    parts = layout.lists(content)
    layout.check(parts)
    return CalibrationSet(parts["xs"], parts["ts"], parts.get("cs"), parts.get("ucs"))
