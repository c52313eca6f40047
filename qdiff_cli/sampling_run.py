"""A sampling command made ready: what the three sampling scripts, the comparison and the tables run alike."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from qdiff.errors import ConfigError
from qdiff.utils.memory import Fitting, halving
from qdiff_cli.images import load_metadata
from qdiff_cli.options import JOB_NAMES, autocast_dtype, printable
from qdiff_cli.quantization import QuantizationTask, prepare_network
from qdiff_cli.running import Ranks, discard_on_error, log_to, open_run, sample_missing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingRun:
    """Checked options with the sampler that they describe.

    title: what is sampled, in words. draw: from (network, indices, callback on the sampler) to x_0 or latents. decode: from these to uint8
    images [N, 3, H, W]. denoiser: eps(x_t, t) of a network for the images of these indices. total,
    batch_size: images to make, in fixed chunks. runs: the folder of run folders; images: the folder of images inside a run; name:
    their pattern. metadata: the text inside image i. extends: the option that says how many images there are. fitting: the batch that is
    known to fit into memory. begin, finish: called with the run's folder, before and after sampling, by the first process.
    """

    title: str
    args: argparse.Namespace
    device: torch.device
    task: QuantizationTask
    draw: Callable[..., Tensor]
    decode: Callable[[Tensor], Tensor]
    denoiser: Callable[[nn.Module, Sequence[int]], Callable]
    total: int
    batch_size: int
    runs: Path
    images: str = "img"
    name: str = "{}.png"
    metadata: Callable[[int], dict[str, str]] | None = None
    extends: str = "max_images"
    fitting: Fitting = field(default_factory=Fitting)
    begin: Callable[[Path], None] = lambda folder: None
    finish: Callable[[Path], None] = lambda folder: None

    def sample(self, network: nn.Module, indices: Sequence[int], callback: Callable | None = None) -> Tensor:
        """uint8 images [N, 3, H, W] of these indices; halves of them, one after the other, where memory does not suffice.

        Raises:
            NonFiniteError: a value that is not a finite number, before or after decoding.
        """
        half = autocast_dtype(self.device, self.args.precision)
        made: list[Tensor] = []

        def work(part: Sequence[int]) -> None:
            with torch.autocast(self.device.type, half or torch.float32, enabled=half is not None):
                made.append(self.decode(self.draw(network, part, callback)))

        if callback is None:
            halving(work, indices, self.fitting)
        else:  # which sees the whole batch at each step
            work(indices)
        return torch.cat(made) if len(made) > 1 else made[0]

    def chunks(self, count: int) -> list[range]:
        """The first `count` images in chunks of the batch size."""
        return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]


def run(job: SamplingRun) -> Path:
    """Load or calibrate, sample what is missing; the folder of the images."""
    args, ranks = job.args, Ranks.from_environment(job.device)
    folder = ranks.from_first(lambda: open_run(job.runs, printable(args), args.continue_run, job.extends))
    log_to(folder if ranks.rank == 0 else None, args.verbose)
    images = folder / job.images
    ranks.from_first(lambda: check_metadata(job, images))
    if ranks.rank == 0:
        job.begin(folder)
    with discard_on_error(folder):
        network = prepare_network(args, job.task, job.device, folder, ranks)
    sample_missing(
        images, job.total, job.batch_size, lambda indices: job.sample(network, indices), ranks, job.name, job.metadata
    )
    ranks.barrier()
    if missing := sum(not (images / job.name.format(i)).exists() for i in range(job.total)):
        raise ConfigError(
            f"{images}: {missing} of {job.total} images are missing; expected a folder that all processes share"
        )
    if ranks.rank == 0:
        log.info(
            "precision: %s", str(autocast_dtype(job.device, args.precision) or torch.float32).removeprefix("torch.")
        )
        job.finish(folder)
        print(f"{job.total} images in {images}")
    return images


def check_metadata(job: SamplingRun, images: Path) -> None:
    """Raise ConfigError where an image of a continued run was made from another prompt than the one that it has now."""
    if job.metadata is None or not job.args.continue_run:
        return
    for i in range(job.total):
        if (file := images / job.name.format(i)).exists():
            made, now = load_metadata(file).get("prompt"), job.metadata(i)["prompt"]
            if made != now:
                raise ConfigError(
                    f"--continue: {file} was made from the prompt {made!r}, which is {now!r} now; expected prompts to be added"
                )


def prepare(command: Sequence[str]) -> SamplingRun:
    """The job of a sampling command: the name of its script, then its options.

    Raises:
        ConfigError: no such sampling script.
    """
    module, args = parse(command)
    return module.prepare(args)


def parse(command: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The sampling script of a command, and its options."""
    name = Path(command[0]).name if command else ""
    if name not in JOB_NAMES:
        raise ConfigError(
            f"{name or 'no command'}: expected a sampling command, one of {', '.join(JOB_NAMES)} and its options"
        )
    module = import_module(f"qdiff_cli.commands.{JOB_NAMES[name]}")
    return module, module.parse(list(command[1:]))
