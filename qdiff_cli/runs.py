"""Runs: their output folder, their log, and a loop over images that can be interrupted and continued."""

import json
import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qdiff.errors import CheckpointError, ConfigError, WriteError
from qdiff.utils import distributed
from qdiff.utils.files import write_text
from qdiff_cli.images import load_metadata, save_png

log = logging.getLogger(__name__)
EARLY_RECORDS = 1000
_handlers: list[logging.Handler] = []  # the handlers that `log_to` added to the root logger

# Settings that may differ when a run is continued.
IGNORED_SETTINGS = {"continue_run", "verbose", "logdir", "outdir", "resume", "cali_cache_gb"}
RENAMED_SETTINGS = {"time_sets": "timestep_groups"}  # old names in a run.json of version 0.1.0
OWN_FILES = {"run.json", "run.log", "sampling_config.yaml", "cut_prompts.txt"}  # files of a run without results


def _do_nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class RunOutput:
    """The files of a run.

    Attributes:
        runs: the folder of run folders.
        images: the name of the folder of images inside the folder of a run.
        name: the pattern of the names of the images.
        metadata: returns the text chunks of the image with an index; None: images have no text.
        extends: the option that sets the number of images.
        begin: is called with the folder of the run before sampling, by the first process.
        finish: is called with the folder of the run after sampling, by the first process.
    """

    runs: Path
    images: str = "img"
    name: str = "{}.png"
    metadata: Callable[[int], dict[str, str]] | None = None
    extends: str = "max_images"
    begin: Callable[[Path], None] = _do_nothing
    finish: Callable[[Path], None] = _do_nothing

    def open(self, settings: Mapping[str, Any], continue_run: bool) -> Path:
        """The folder of the run; see `open_run`."""
        return open_run(self.runs, settings, continue_run, self.extends)

    def images_of(self, folder: Path) -> Path:
        """The folder of the images of a run."""
        return folder / self.images

    def missing(self, folder: Path, total: int) -> list[int]:
        """The indices of the images of a run that are not there yet."""
        return [i for i in range(total) if not (self.images_of(folder) / self.name.format(i)).exists()]

    def validate_prompts(self, folder: Path, total: int) -> None:
        """Raise ConfigError if an image of a continued run was sampled from another prompt than it would be now."""
        if self.metadata is None:
            return
        for i in sorted(set(range(total)) - set(self.missing(folder, total))):
            file = self.images_of(folder) / self.name.format(i)
            before, now = load_metadata(file).get("prompt"), self.metadata(i)["prompt"]
            if before != now:
                raise ConfigError(
                    f"--continue: {file} was made from the prompt {before!r}, which is {now!r} now; "
                    "expected prompts to be added"
                )


def open_run(parent: Path, settings: Mapping[str, Any], continue_run: bool, extends: str) -> Path:
    """Open the folder of a run: a new folder `<parent>/<timestamp>`, or the newest one if a run is continued.

    The settings are stored in its `run.json`. When a run is continued, the settings that change its images must be the
    same.

    Args:
        parent: the folder of run folders.
        settings: the values of all options by name.
        continue_run: continue the newest run.
        extends: the option that only sets the number of images. It may differ when a run is continued.

    Raises:
        ConfigError: there is no run to continue, it has other settings, or the folder cannot be written.
    """
    ignored = IGNORED_SETTINGS | {extends}
    settings = {key: value for key, value in settings.items() if key not in ignored}
    if continue_run:
        runs = sorted(path.parent for path in parent.glob("*/run.json"))
        if not runs:
            raise ConfigError(f"--continue: no earlier run in {parent}")
        _validate_settings(runs[-1], settings, ignored)
        for leftover in runs[-1].rglob(".*.part"):  # from a run that was killed while it wrote a file
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
    """Remove the folder of a run if the code inside the `with` fails before it has written results."""
    try:
        yield
    except (ConfigError, CheckpointError, OSError):
        is_first = distributed.rank() == 0
        if is_first and folder.is_dir() and {path.name for path in folder.iterdir()} <= OWN_FILES:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _validate_settings(folder: Path, settings: Mapping[str, Any], ignored: set[str]) -> None:
    """Raise ConfigError if the run in `folder` has other settings, except those in `ignored`."""
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ConfigError(f"--continue: {folder / 'run.json'} is damaged; start a new run") from None
    before = {RENAMED_SETTINGS.get(key, key): value for key, value in before.items()}
    now = json.loads(json.dumps(settings))
    for key in sorted((set(before) | set(now)) - ignored):
        if before.get(key) != now.get(key):
            raise ConfigError(f"--continue: {key} is {now.get(key)} now, but was {before.get(key)} in {folder}")


class _LogFile(logging.FileHandler):
    """A log file. If it cannot be written, the run continues without it after one warning."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        log.warning("%s: cannot be written (%s): the run goes on without it", self.baseFilename, sys.exc_info()[1])


class _Early(logging.Handler):
    """Keeps the last records until there is a log file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=EARLY_RECORDS)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def log_to(folder: Path | None, verbose: bool) -> None:
    """Log to stderr and to a file. An earlier call has no effect any more.

    Args:
        folder: the folder of `run.log`; None: log to stderr, and keep the records for the file of a later call.
        verbose: log details.
    """
    root = logging.getLogger()
    early = [record for handler in _handlers if isinstance(handler, _Early) for record in handler.records]
    for handler in _handlers:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    for chatty in ("matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    formatter = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    handlers[0].setLevel(logging.INFO if verbose else logging.WARNING)
    if folder is None:
        handlers.append(_Early())
    else:
        handlers.append(_LogFile(folder / "run.log", encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    for record in early if folder is not None else []:
        handlers[-1].handle(record)
    _handlers[:] = handlers


def sample_missing(
    folder: Path,
    total: int,
    batch_size: int,
    sample: Callable[[list[int]], Tensor],
    name: str = "{}.png",
    metadata: Callable[[int], dict[str, str]] | None = None,
) -> int:
    """Write the images 0 to total - 1 that are not in `folder` yet.

    Batches always consist of the same images. A batch with a missing image is sampled as a whole, so an image has the
    same bits whenever and on whatever process it is sampled.

    Args:
        folder: the folder of the images.
        total: the number of images.
        batch_size: images of one batch.
        sample: returns uint8 images [N, C, H, W] for the indices of a batch.
        name: the pattern of the file names.
        metadata: returns the text chunks of the image with an index; None: images have no text.

    Returns:
        The number of images that this process wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = [list(range(start, min(start + batch_size, total))) for start in range(0, total, batch_size)]
    missing = [batch for batch in batches if any(not (folder / name.format(i)).exists() for i in batch)]
    rank, world = distributed.rank(), distributed.world()
    own = missing if world == 1 else [batch for batch in missing if batch[0] // batch_size % world == rank]
    finished = total - sum(len(batch) for batch in missing)
    count, written = finished + sum(map(len, own)), 0
    with logging_redirect_tqdm(), tqdm(total=count, initial=finished, desc="sampling", unit="image") as progress:
        for batch in own:
            for i, image in zip(batch, sample(batch), strict=True):
                if not (folder / name.format(i)).exists():
                    save_png(folder / name.format(i), image, metadata(i) if metadata else None)
                    written += 1
            progress.update(len(batch))
    return written
