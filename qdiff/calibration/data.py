"""The calibration set: (x_t, t[, context]) of all time steps, from the sampling trajectory of the model itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.calibration.file_layouts import Layout
from qdiff.calls import ScalarArg, TensorArg, map_leaves, named_leaves, output_tensor
from qdiff.checkpoint import load_object, state_hash
from qdiff.errors import CheckpointError, ConfigError
from qdiff.utils.files import atomic_write


@dataclass(frozen=True)
class CalibrationSet:
    """A calibration set in the structure of the published file.

    The lists are over time steps, in the order in which sampling visits them.

    Attributes:
        xs: x_t, [N, C, H, W] for each time step.
        ts: the time of each sample, [N] for each time step.
        cs: conditional contexts, [N, L, D] for each time step; None: the model is not guided.
        ucs: unconditional contexts, [N, L, D] for each time step; None: the model is not guided.
    """

    xs: list[Tensor]
    ts: list[Tensor]
    cs: list[Tensor] | None = None
    ucs: list[Tensor] | None = None

    def select(self, num_timesteps: int, samples: int) -> "CalibrationData":
        """Select time steps, spread evenly, and the first samples of each.

        Args:
            num_timesteps: the number of time steps.
            samples: the number of samples of each time step.

        Raises:
            CheckpointError: the set holds fewer time steps or samples.
        """
        if num_timesteps > len(self.ts):
            message = f" {num_timesteps}: the calibration set holds {len(self.ts)} time steps"
            raise CheckpointError(message, field="num_timesteps")
        if samples > len(self.xs[0]):
            message = f" {samples}: the calibration set holds {len(self.xs[0])} samples of each time step"
            raise CheckpointError(message, field="samples")
        chosen = spread(num_timesteps, len(self.ts))
        x = torch.cat([self.xs[i][:samples] for i in chosen])
        t = torch.cat([self.ts[i][:samples] for i in chosen])
        trajectories = torch.arange(len(self.xs[0][:samples])).repeat(num_timesteps)
        if self.cs is None or self.ucs is None:
            return CalibrationData((x.float(), t.float()), trajectories)
        context = [torch.cat([part[i][:samples] for i in chosen]).float() for part in (self.cs, self.ucs)]
        inputs = (torch.cat([x, x]).float(), torch.cat([t, t]).float(), torch.cat(context))
        return CalibrationData(inputs, trajectories.repeat(2))


def spread(count: int, total: int) -> list[int]:
    """`count` indices below `total`, spread evenly up to the end, also if `count` does not divide `total`."""
    return [total * i // count for i in range(count)]


@dataclass(frozen=True)
class InputSpec:
    """How a network is called with samples.

    Attributes:
        args: its positional inputs; a `TensorArg` stands for a tensor with the samples first, a `ScalarArg` for a
            number that the samples of a call share. Everything else is the same in all calls, tensors included.
        kwargs: its inputs by keyword, in the same way.
        time: which of the tensors is the time step of each sample; None: the network has none.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    time: int | None

    @classmethod
    def positional(cls, count: int) -> "InputSpec":
        """Tensors by position: x_t, the time step, contexts."""
        return cls(tuple(TensorArg(index) for index in range(count)), {}, 1 if count > 1 else None)

    @property
    def scalars(self) -> list[int]:
        """Which of the tensors hold numbers that the samples of a call must share."""
        return [leaf.index for _, leaf in named_leaves([self.args, self.kwargs]) if isinstance(leaf, ScalarArg)]

    @property
    def shared(self) -> dict[str, Tensor]:
        """The tensors that all samples share, by name."""
        leaves = named_leaves([self.args, self.kwargs])
        return {name: leaf for name, leaf in leaves if isinstance(leaf, Tensor)}

    def __call__(self, model: nn.Module, tensors: Sequence[Tensor], device: torch.device) -> Any:
        """What `model` returns for some samples."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, TensorArg):
                return tensors[leaf.index].to(device)
            value = leaf.value(tensors[leaf.index]) if isinstance(leaf, ScalarArg) else leaf
            return value.to(device, copy=True) if isinstance(value, Tensor) else value

        return model(*map_leaves(fill, self.args), **map_leaves(fill, self.kwargs))


@dataclass(frozen=True)
class CalibrationData:
    """The samples that a network is calibrated on, with their training and validation splits.

    Attributes:
        inputs: the inputs of the network that differ between samples (x_t, t, contexts), each with the samples first.
        trajectories: the number of the trajectory that each sample comes from, [N]; None: each has its own trajectory.
        num_train: samples before this index are the training split, the others the validation split, which is never
            trained on. None: the data is not split, and all of it is for training.
        call: how the network is called with them; None: by position, the time step second.
    """

    inputs: tuple[Tensor, ...]
    trajectories: Tensor | None = None
    num_train: int | None = None
    call: InputSpec | None = None

    @cached_property
    def spec(self) -> InputSpec:
        """How the network is called."""
        return InputSpec.positional(len(self.inputs)) if self.call is None else self.call

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, ...]:
        """Copies of some samples. They may be changed in place."""
        return tuple(tensor[index].clone() if isinstance(index, slice) else tensor[index] for tensor in self.inputs)

    def x(self, index: Tensor | slice) -> Tensor:
        """x_t of some samples, [N, ...]: the first input of floating-point values with two dimensions or more."""
        wide = (tensor for tensor in self.inputs if tensor.dim() > 1 and tensor.is_floating_point())
        return next(wide, self.inputs[0])[index]

    def timesteps(self, index: Tensor | slice) -> Tensor:
        """The time steps of some samples, [N].

        Raises:
            ConfigError: the network has no time step.
        """
        if self.spec.time is None:
            raise ConfigError(" without a time step: expected it as the second input, or by keyword", field="inputs")
        return self.inputs[self.spec.time][index].flatten()

    def run(self, model: nn.Module, index: Tensor | slice, device: torch.device) -> Tensor:
        """The output of `model` for some samples, on the device of the network.

        A network that takes the time step as a number is called once for each time step among the samples.

        Args:
            model: the network, or one that is called in the same way.
            index: which samples.
            device: the device of the network.

        Returns:
            [N, ...]: of several tensors that the network returns the first one (`output_tensor`).
        """
        parts = self.uniform_parts(index)
        outputs = []
        for part in parts:
            tensors = self[part]
            outputs.append(output_tensor(self.spec(model, tensors, device), len(tensors[0])))
        if len(outputs) == 1:
            return outputs[0]
        numbers = torch.arange(len(self))[index]
        order = torch.cat([torch.arange(len(numbers))[member] for member in self._members(numbers)])
        return torch.cat(outputs)[order.argsort().to(outputs[0].device)]

    def batches(self, size: int) -> list[range | Tensor]:
        """All samples in batches of at most `size` that the network can be called with."""
        parts = self.uniform_parts(slice(None))
        everything = [range(len(self)) if isinstance(part, slice) else part for part in parts]
        return [part[start : start + size] for part in everything for start in range(0, len(part), size)]

    def uniform_parts(self, index: Tensor | slice) -> list[Tensor | slice]:
        """Split samples into parts that the network can be called with: [index] unless it takes numbers."""
        if not self.spec.scalars:
            return [index]
        numbers = torch.arange(len(self))[index]
        return [numbers[member] for member in self._members(numbers)]

    def alike(self, count: int) -> Tensor:
        """The indices of `count` samples that one call of the network takes, [count]; few ones repeat themselves."""
        numbers = torch.arange(len(self))
        largest = max((numbers[part] for part in self.uniform_parts(slice(None))), key=len)
        return largest[torch.arange(count) % len(largest)]

    def _members(self, numbers: Tensor) -> list[Tensor]:
        """For each combination of numbers which of the samples `numbers` have it, as masks."""
        keys = torch.stack([self.inputs[place][numbers].double().cpu() for place in self.spec.scalars], dim=1)
        kinds, which = keys.unique(dim=0, return_inverse=True)
        return [which == kind for kind in range(len(kinds))]

    @property
    def train(self) -> range:
        """The indices of the training split."""
        return range(len(self) if self.num_train is None else self.num_train)

    @property
    def validation(self) -> range:
        """The indices of the validation split."""
        return range(len(self.train), len(self))

    def fewer(self, training: int) -> "CalibrationData":
        """At most `training` samples of the training split, and the same share of the validation split."""
        if training >= len(self.train):
            return self
        share = max(1, round(len(self.validation) * training / len(self.train)))
        kept = torch.cat([torch.arange(training), torch.arange(share) + len(self.train)])
        trajectories = None if self.trajectories is None else self.trajectories[kept]
        return replace(self, inputs=self[kept], trajectories=trajectories, num_train=training)

    def training_data(self) -> "CalibrationData":
        """The training split alone."""
        return replace(self, inputs=self[: len(self.train)], trajectories=None, num_train=None)

    def hash(self) -> str:
        """A sha256 over all samples."""
        parts = [*self.inputs, *([] if self.trajectories is None else [self.trajectories])]
        state = {str(number): tensor for number, tensor in enumerate(parts)}
        if self.call is not None:
            constants = map_leaves(
                lambda leaf: None if isinstance(leaf, Tensor) else leaf, [self.call.args, self.call.kwargs]
            )
            state |= self.call.shared | {"call": torch.tensor(list(repr(constants).encode()), dtype=torch.uint8)}
        return state_hash(state)

    def split(self, fraction: float, seed: int) -> "CalibrationData":
        """Shuffle the samples and divide them into a training and a validation split.

        The validation split consists of whole trajectories. Samples of one trajectory (its other time steps, or the
        same time step with another condition) are too similar to judge one another.

        Args:
            fraction: the share of the trajectories in the validation split, 0 to 1. At least one trajectory is in it.
            seed: seed of the order and of the choice of trajectories.
        """
        generator = torch.Generator().manual_seed(seed)
        trajectories = torch.arange(len(self)) if self.trajectories is None else self.trajectories
        if len(numbers := trajectories.unique()) < 2:
            numbers = trajectories = torch.arange(len(self))
        shuffled = numbers[torch.randperm(len(numbers), generator=generator)]
        validation_numbers = shuffled[: max(1, int(len(numbers) * fraction))]
        order = torch.randperm(len(self), generator=generator)
        is_validation = torch.isin(trajectories[order], validation_numbers)
        order = torch.cat([order[~is_validation], order[is_validation]])
        return replace(
            self, inputs=self[order], trajectories=trajectories[order], num_train=int((~is_validation).sum())
        )


def validate_num_timesteps(num_timesteps: int, evaluations: int) -> None:
    """Check that a sampler makes enough steps for a calibration set.

    Args:
        num_timesteps: the number of time steps of the calibration set.
        evaluations: the number of time steps at which the sampler evaluates the network.

    Raises:
        ConfigError: `num_timesteps` is larger than `evaluations`.
    """
    if num_timesteps > evaluations:
        message = f" {num_timesteps}: the sampler makes only {evaluations} steps"
        raise ConfigError(message, field="num_timesteps")


class Recorder:
    """A callback of a sampler that records x_t and t at some evaluations of the network.

    Args:
        num_timesteps: the number of evaluations that are recorded, spread evenly.
        total: the number of evaluations that the sampler makes.

    Raises:
        ConfigError: `num_timesteps` is larger than `total`.
    """

    def __init__(self, num_timesteps: int, total: int) -> None:
        validate_num_timesteps(num_timesteps, total)
        self.recorded = set(spread(num_timesteps, total))
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
    """Generate a calibration set: run the full-precision sampler and record some of its evaluations.

    Args:
        run_sampler: samples the images of the given indices and calls the recorder at each evaluation.
        num_timesteps: the number of evaluations that are recorded.
        evaluations: the number of evaluations that the sampler makes for one image.
        samples: the number of images that are sampled.
        batch_size: images of one batch.

    Raises:
        ConfigError: the sampler makes another number of evaluations.
    """
    recorders = []
    for start in tqdm(
        range(0, samples, batch_size), desc="calibration set", unit="batch", disable=samples <= batch_size
    ):
        recorder = Recorder(num_timesteps, evaluations)
        run_sampler(list(range(start, min(start + batch_size, samples))), recorder)
        if recorder.seen != evaluations:
            raise ConfigError(
                f"the sampler evaluated the network {recorder.seen} times, expected {evaluations} as its "
                "num_evaluations says"
            )
        recorders.append(recorder)
    return CalibrationSet(
        xs=[torch.cat(parts) for parts in zip(*(recorder.xs for recorder in recorders), strict=True)],
        ts=[torch.cat(parts) for parts in zip(*(recorder.ts for recorder in recorders), strict=True)],
    )


def save_set(path: str | Path, data: CalibrationSet) -> None:
    """Write a calibration set to a published file, a dict of lists of tensors."""
    content = {"xs": data.xs, "ts": data.ts}
    if data.cs is not None and data.ucs is not None:
        content |= {"cs": data.cs, "ucs": data.ucs}
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
    ):  # given a path, torch stores its name in the file
        torch.save(content, file)


def load_set(path: str | Path, shape: Iterable[int], context_dim: int | None = None) -> CalibrationSet:
    """Read a calibration file and check it against the network.

    Files with another layout than the published one are read if the layout is unambiguous
    (`qdiff.calibration.file_layouts`).

    Args:
        path: the file.
        shape: (C, H, W) of x_t.
        context_dim: the width of the contexts of the network; None: the network takes no contexts.

    Raises:
        CheckpointError: the file is not a calibration set, or it is damaged, ambiguous, or for another network.
    """
    content = load_object(path, arrays=True)
    if not isinstance(content, dict) or not {"xs", "ts"} <= set(content):
        found = type(content).__name__
        if isinstance(content, dict):
            found = f"a dict with {', '.join(map(str, list(content)[:4]))}"
        raise CheckpointError(f"{path}: expected a calibration set (a dict with xs and ts), found {found}")
    content = {name: content[name] for name in ("xs", "ts", "cs", "ucs") if content.get(name) is not None}
    expected = {"xs", "ts"} if context_dim is None else {"xs", "ts", "cs", "ucs"}
    if set(content) != expected:
        kind = "an unconditional" if context_dim is None else "a guided"
        raise CheckpointError(
            f"{path}: expected {', '.join(sorted(expected))} for {kind} network, found {', '.join(sorted(content))}"
        )
    layout = Layout(path, tuple(shape), context_dim)
    entries = layout.read(content)
    layout.validate(entries)
    return CalibrationSet(entries["xs"], entries["ts"], entries.get("cs"), entries.get("ucs"))
