"""Runs: the output folder, the log, several processes, and the loop over images that an interruption cannot spoil."""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qdiff.errors import CheckpointError, ConfigError, WriteError
from qdiff.utils.files import write_text
from qdiff_cli.images import save_png

log = logging.getLogger(__name__)
_handlers: list[logging.Handler] = []  # those that `log_to` added

IGNORED_SETTINGS = {"continue_run", "verbose", "logdir", "outdir", "resume", "cali_cache_gb"}


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started (one, where it did not)."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, device: torch.device | None = None) -> "Ranks":
        """This process; the first call connects it with the others, for work on `device` (default: the CPU).

        Raises:
            ConfigError: some of the variables that torchrun sets are there, and others are not.
        """
        ranks = cls(_of_torchrun("RANK", 0), _of_torchrun("WORLD_SIZE", 1))
        if ranks.world > 1 and not dist.is_initialized():
            _connect(ranks.world, gpus=device is not None and device.type == "cuda")
        return ranks

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank, on every rank; its error is raised on every rank too."""
        if self.world == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _of_torchrun(name: str, default: int) -> int:
    """A number that torchrun sets for each of its processes."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name}={text} in the environment: expected a whole number")
    missing = [other for other in TORCHRUN if other not in os.environ]
    if name == "WORLD_SIZE" and int(text) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={text} in the environment without {', '.join(missing)}: "
            "expected all of them (torchrun sets them) or none (unset it)"
        )
    return int(text)


def _connect(world: int, gpus: bool) -> None:
    """Join the processes that torchrun started; tensors on GPUs go by NCCL, those on CPUs by gloo."""
    from lightning_fabric import Fabric  # takes two seconds, for which one process alone has no use
    from lightning_fabric.strategies import DDPStrategy

    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if gpus and local > torch.cuda.device_count():
        raise ConfigError(
            f"{local} processes on this machine with {torch.cuda.device_count()} GPU(s): expected at most one process for each"
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    strategy = DDPStrategy(process_group_backend=backend, timeout=timedelta(days=30))  # a calibration may take long
    Fabric(accelerator="cuda" if gpus else "cpu", devices=local, num_nodes=world // local, strategy=strategy).launch()


def open_run(parent: Path, settings: dict[str, Any], continue_run: bool, extends: str) -> Path:
    """A new folder `<parent>/<timestamp>`, or the newest one there if a run is continued.

    The settings are kept in its `run.json`; those that change the images must be the same when it is continued. `extends` names the one
    that only says how many images there are: it may be another then.

    Raises:
        ConfigError: nothing to continue, other settings, or a folder that cannot be written.
    """
    ignored = IGNORED_SETTINGS | {extends}
    settings = {key: value for key, value in settings.items() if key not in ignored}
    if continue_run:
        runs = sorted(path.parent for path in parent.glob("*/run.json"))
        if not runs:
            raise ConfigError(f"--continue: no earlier run in {parent}")
        _check_settings(runs[-1], settings, ignored)
        for leftover in runs[-1].rglob(".*.part"):  # of a file that was being written when the run was killed
            leftover.unlink(missing_ok=True)
        return runs[-1]
    folder = parent / time.strftime("%Y-%m-%d-%H-%M-%S")
    number = 1
    try:
        while True:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
                folder = folder.with_name(f"{folder.name[:19]}-{number}")
        write_text(folder / "run.json", json.dumps(settings, indent=1, sort_keys=True))
    except WriteError:
        raise
    except OSError as error:
        raise ConfigError(f"{parent}: cannot be written ({error.strerror or error})") from None
    return folder


@contextmanager
def discard_on_error(folder: Path) -> Iterator[None]:
    """Remove a run's folder again if the work inside the `with` fails before it has written anything but its settings."""
    try:
        yield
    except (ConfigError, CheckpointError, OSError):
        first = Ranks.from_environment().rank == 0
        if (
            first
            and folder.is_dir()
            and {path.name for path in folder.iterdir()}
            <= {"run.json", "run.log", "sampling_config.yaml", "cut_prompts.txt"}
        ):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_settings(folder: Path, settings: dict[str, Any], ignored: set[str]) -> None:
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ConfigError(f"--continue: {folder / 'run.json'} is damaged; start a new run") from None
    now = json.loads(json.dumps(settings))
    for key in sorted((set(before) | set(now)) - ignored):
        if before.get(key) != now.get(key):
            raise ConfigError(f"--continue: {key} is {now.get(key)} now, but was {before.get(key)} in {folder}")


class _LogFile(logging.FileHandler):
    """A log file that may fill its disk: the run goes on without it, and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        log.warning("%s: cannot be written (%s): the run goes on without it", self.baseFilename, sys.exc_info()[1])


def log_to(folder: Path | None, verbose: bool) -> None:
    """Log to stderr and to `<folder>/run.log`, and no longer to where an earlier call said."""
    root = logging.getLogger()
    for handler in _handlers:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    for chatty in ("matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    form = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    handlers[0].setLevel(logging.INFO if verbose else logging.WARNING)
    if folder is not None:
        handlers.append(_LogFile(folder / "run.log", encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
    _handlers[:] = handlers


def setup_threads(threads: int) -> None:
    """A fixed number of threads: the order of sums, so the last bits of images, depends on it."""
    torch.set_num_threads(threads)


def sample_missing(
    folder: Path,
    total: int,
    batch_size: int,
    make: Callable[[list[int]], Tensor],
    ranks: Ranks,
    name: str = "{}.png",
    metadata: Callable[[int], dict[str, str]] | None = None,
) -> int:
    """Write the images 0 to total - 1 that are not in `folder` yet; the number written by this process.

    Images come in fixed chunks of `batch_size`: a chunk of which any image is missing is computed
    whole, so an image has the same bits whenever and wherever it is made. `make` returns uint8
    [N, C, H, W] for the given indices; `metadata` gives the text inside image i.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [list(range(start, min(start + batch_size, total))) for start in range(0, total, batch_size)]
    todo = [chunk for chunk in chunks if any(not (folder / name.format(i)).exists() for i in chunk)]
    mine = todo if ranks.world == 1 else [chunk for chunk in todo if chunk[0] // batch_size % ranks.world == ranks.rank]
    done = total - sum(len(chunk) for chunk in todo)
    written = 0
    with (
        logging_redirect_tqdm(),
        tqdm(total=done + sum(map(len, mine)), initial=done, desc="sampling", unit="image") as progress,
    ):
        for chunk in mine:
            for i, image in zip(chunk, make(chunk), strict=True):
                if not (folder / name.format(i)).exists():
                    save_png(folder / name.format(i), image, metadata(i) if metadata else None)
                    written += 1
            progress.update(len(chunk))
    return written
