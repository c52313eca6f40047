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
    """A calibration set as the published file holds it: lists over time steps, in the order in which sampling visits
    them.

    Attributes:
        xs: x_t, [N, C, H, W] for each time step.
        ts: the time of each sample, [N] for each time step.
        cs: conditional contexts, [N, L, D] for each time step, of guided models only.
        ucs: unconditional contexts, likewise.
    """

    xs: list[Tensor]
    ts: list[Tensor]
    cs: list[Tensor] | None = None
    ucs: list[Tensor] | None = None

    def select(self, num_timesteps: int, samples: int) -> "CalibrationData":
        """Take `num_timesteps` time steps, spread evenly, and the first `samples` samples of each.

        Raises:
            CheckpointError: the set holds fewer.
        """
        if num_timesteps > len(self.ts):
            message = f" {num_timesteps}: the calibration set holds {len(self.ts)} time steps"
            raise CheckpointError(message, field="num_timesteps")
        if samples > len(self.xs[0]):
            message = f" {samples}: the calibration set holds {len(self.xs[0])} samples of each time step"
            raise CheckpointError(message, field="samples")
        chosen = _spread(num_timesteps, len(self.ts))
        x = torch.cat([self.xs[i][:samples] for i in chosen])
        t = torch.cat([self.ts[i][:samples] for i in chosen])
        trajectories = torch.arange(len(self.xs[0][:samples])).repeat(num_timesteps)
        if self.cs is None or self.ucs is None:
            return CalibrationData((x.float(), t.float()), trajectories)
        context = [torch.cat([part[i][:samples] for i in chosen]).float() for part in (self.cs, self.ucs)]
        inputs = (torch.cat([x, x]).float(), torch.cat([t, t]).float(), torch.cat(context))
        return CalibrationData(inputs, trajectories.repeat(2))


def _spread(count: int, total: int) -> list[int]:
    """`count` of `total` numbers, spread evenly up to the end, also if `count` does not divide `total`."""
    return [total * i // count for i in range(count)]


@dataclass(frozen=True)
class CalibrationData:
    """The samples that a network is calibrated on, with their training and validation splits.

    Attributes:
        inputs: the positional inputs of the network (x_t, t, contexts), each with the samples first.
        trajectories: the number of the trajectory that each sample was taken from, [N]; None: no two belong together.
        num_train: samples before this index are the training split, the others the validation split, which is never
            trained on. None: the data is not split, and all of it is for training.
    """

    inputs: tuple[Tensor, ...]
    trajectories: Tensor | None = None
    num_train: int | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Copies of some samples, which may be changed in place."""
        return tuple(tensor[index].clone() if isinstance(index, slice) else tensor[index] for tensor in self.inputs)

    @property
    def train(self) -> range:
        """The indices of the training split."""
        return range(len(self) if self.num_train is None else self.num_train)

    @property
    def validation(self) -> range:
        """The indices of the validation split."""
        return range(len(self.train), len(self))

    def training_data(self) -> "CalibrationData":
        """The training split alone."""
        return CalibrationData(self[: len(self.train)])

    def hash(self) -> str:
        """A sha256 over all samples."""
        parts = [*self.inputs, *([] if self.trajectories is None else [self.trajectories])]
        return state_hash({str(number): tensor for number, tensor in enumerate(parts)})

    def split(self, fraction: float, seed: int) -> "CalibrationData":
        """The samples in random order, with a training and a validation split.

        Whole trajectories go to the validation split: another time step of a trajectory, or the same one with another
        condition, would tell about it.

        Args:
            fraction: the share of the trajectories in the validation split; at least one trajectory is.
            seed: seed of the order and of the choice.
        """
        generator = torch.Generator().manual_seed(seed)
        of_sample = torch.arange(len(self)) if self.trajectories is None else self.trajectories
        if len(numbers := of_sample.unique()) < 2:
            numbers = of_sample = torch.arange(len(self))
        chosen = numbers[torch.randperm(len(numbers), generator=generator)][: max(1, int(len(numbers) * fraction))]
        order = torch.randperm(len(self), generator=generator)
        validates = torch.isin(of_sample[order], chosen)
        order = torch.cat([order[~validates], order[validates]])
        return CalibrationData(self[order], of_sample[order], int((~validates).sum()))


def validate_num_timesteps(num_timesteps: int, evaluations: int) -> None:
    """Check that a sampler makes enough steps.

    Raises:
        ConfigError: more time steps are asked for than the sampler evaluates the network at.
    """
    if num_timesteps > evaluations:
        message = f" {num_timesteps}: the sampler makes only {evaluations} steps"
        raise ConfigError(message, field="num_timesteps")


class Recorder:
    """A sampler's callback that records x_t and t at some evaluations of the network.

    Args:
        num_timesteps: how many evaluations are recorded, spread evenly.
        total: how many the sampler makes.

    Raises:
        ConfigError: the sampler makes fewer.
    """

    def __init__(self, num_timesteps: int, total: int) -> None:
        validate_num_timesteps(num_timesteps, total)
        self.recorded = set(_spread(num_timesteps, total))
        self.seen = 0
        self.xs: list[Tensor] = []
        self.ts: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, eps: Tensor) -> None:
        if self.seen in self.recorded:
            self.xs.append(x.detach().float().cpu().clone())
            self.ts.append(t.detach().float().cpu().clone())
        self.seen += 1


def generate(
    run_sampler: Callable[[list[int], Recorder], object],
    num_timesteps: int,
    evaluations: int,
    samples: int,
    batch_size: int,
) -> CalibrationSet:
    """Draw a calibration set: run the full-precision sampler and record some of its evaluations.

    Args:
        run_sampler: samples the images of the given indices and calls the callback at each evaluation.
        num_timesteps: how many evaluations are recorded.
        evaluations: how many the sampler makes for one image.
        samples: how many images are sampled.
        batch_size: images of one batch.
    """
    recorders = []
    for start in tqdm(
        range(0, samples, batch_size), desc="calibration set", unit="batch", disable=samples <= batch_size
    ):
        recorder = Recorder(num_timesteps, evaluations)
        run_sampler(list(range(start, min(start + batch_size, samples))), recorder)
        recorders.append(recorder)
    return CalibrationSet(
        xs=[torch.cat(parts) for parts in zip(*(recorder.xs for recorder in recorders), strict=True)],
        ts=[torch.cat(parts) for parts in zip(*(recorder.ts for recorder in recorders), strict=True)],
    )


def save_set(path: str | Path, data: CalibrationSet) -> None:
    """Write the published file, a dict of lists of tensors."""
    content = {"xs": data.xs, "ts": data.ts}
    if data.cs is not None and data.ucs is not None:
        content |= {"cs": data.cs, "ucs": data.ucs}
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a path would leave its name inside
        torch.save(content, file)


def load_set(path: str | Path, shape: Iterable[int], context_dim: int | None = None) -> CalibrationSet:
    """Read a calibration file and check it against the network.

    Other layouts than the published one are read if they can mean one thing only (`qdiff.calibration.file_layouts`).

    Args:
        path: the file.
        shape: (C, H, W) of x_t.
        context_dim: the width of the contexts that the network takes, with and without the condition; None: it takes
            none.

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
