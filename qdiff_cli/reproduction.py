"""Fills tables: samples and evaluates their rows, writes the results, and checks the inputs before a long run."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.evaluation.page import Page, markdown_table
from qdiff.evaluation.similarity import SIMILARITY_DEFINITION, ImageSimilarity
from qdiff.evaluation.trajectory import Trajectories
from qdiff.utils import distributed
from qdiff.utils.files import atomic_write, write_text
from qdiff_cli.comparison import CLOSENESS, save_image_rows
from qdiff_cli.evaluation import EvaluationConfig, evaluate, validate_inputs
from qdiff_cli.images import load_png
from qdiff_cli.options import OPTION_OF_FIELD, DeviceOptions
from qdiff_cli.quantization import PACKED, formats_of, load_calibrated
from qdiff_cli.sampling_run import SamplingRun
from qdiff_cli.table_commands import TableCommands, hashes, read_json
from qdiff_cli.tables import DASH, FULL, QDIFF, PaperTable, Row
from qdiff_cli.widths import own_widths

# The largest trajectory error of nearest rounding with 8-bit weights; the bundled models have 0.006 to 0.011.
CHECK_LIMIT = 0.1
# The largest ratio to the error of nearest rounding, at 4 bits; the bundled checkpoints have 0.3 to 0.7.
CHECK_RATIO = 0.85
CHECK_RECIPE = CalibrationConfig(num_timesteps=10, samples=8)  # for the activation ranges of nearest rounding
CHECK_STEPS, CHECK_IMAGES, GRID_IMAGES = 20, 4, 16
REFERENCE_SEED = 1000  # added to the seed of a table for the full-precision samples that are the reference
PAPER = "arXiv 2302.04304"


@dataclass(frozen=True)
class ReproductionConfig:
    """How the tables are filled.

    Attributes:
        output: the folder of all tables.
        seeds: the number of seeds that every row is sampled with.
        trajectory_images: the number of images for the trajectory error.
        evaluation: the given options of the evaluation. The table provides the others.
        extractor: inception or lite0; None: the table decides.
        device: the device of the networks.
    """

    output: Path
    seeds: int
    trajectory_images: int
    evaluation: EvaluationConfig
    extractor: str | None
    device: DeviceOptions


class TableRun:
    """Samples and evaluates the rows of a table, in the folder of the table.

    Args:
        commands: the commands of the rows.
        config: how the table is filled.
        device: the device of the networks.
    """

    def __init__(self, commands: TableCommands, config: ReproductionConfig, device: torch.device) -> None:
        self.commands, self.config, self.device = commands, config, device
        self.table: PaperTable = commands.table
        self.folder, self.count, self.rows = commands.folder, commands.count, commands.rows
        self.extractor = config.extractor or ("lite0" if self.table.bundled else "inception")
        self.sample_row = cache(self._sample_row)
        self.full_precision, self.trajectory = cache(self._full_precision), cache(self._trajectory)

    def _sample_row(self, row: Row, seed: int) -> tuple[SamplingRun, Path]:
        """Sample the missing images of a row; returns its run and the folder of its images."""
        run = distributed.run_on_first(lambda: self.commands.started(row, seed)).make_run()
        return run, run.execute()

    def network(self, run: SamplingRun, folder: Path | None) -> nn.Module:
        """Load the simulated quantized network of a run.

        Args:
            run: the run.
            folder: its folder, which may hold the result of a calibration; None: the run loads a checkpoint.
        """
        quantization = run.quantization
        assert quantization is not None  # the caller excludes rows in full precision
        calibrated = None if folder is None else folder / PACKED
        path = calibrated if calibrated is not None and calibrated.is_file() else quantization.checkpoint
        assert path is not None  # a run without a checkpoint writes one
        formats = replace(quantization.formats, quant_mode="qdiff")  # the file stores how it was calibrated
        return load_calibrated(path, run.task, formats).to(self.device)

    def _full_precision(self, num_steps: int | None) -> SamplingRun:
        """The full-precision run for trajectories.

        Args:
            num_steps: the number of sampling steps of the check and its grid; None: as in the table.
        """
        count = GRID_IMAGES if num_steps else self.config.trajectory_images
        command = self.commands.full_precision(count, self.table.command.seed, self.folder / "unused")
        return (command.with_num_steps(num_steps) if num_steps else command).make_run()

    def _trajectory(self, count: int, num_steps: int | None) -> tuple[list[list[tuple[Tensor, Tensor, Tensor]]], float]:
        """Sample the first images in full precision.

        Args:
            count: the number of images.
            num_steps: see `_full_precision`.

        Returns:
            (x_t, t, eps) of every step for each batch, and the seconds for an image.
        """
        run = self.full_precision(num_steps)
        model = run.load_full_precision()
        batches = []
        started = time.perf_counter()
        for batch in tqdm(run.batches(count), desc="trajectory in full precision", unit="batch"):
            states: list[tuple[Tensor, Tensor, Tensor]] = []

            def remember(x: Tensor, t: Tensor, eps: Tensor, states: list = states) -> None:
                states.append((x.cpu(), t.cpu(), eps.cpu()))

            run.sample_latents(model, batch, remember)
            batches.append(states)
        return batches, (time.perf_counter() - started) / count

    @torch.no_grad()
    def trajectory_error(self, network: nn.Module, count: int, num_steps: int | None) -> float:
        """The mean relative error of eps over the steps of the full-precision trajectory.

        Args:
            network: the quantized network.
            count: the number of images.
            num_steps: see `_full_precision`.
        """
        run = self.full_precision(num_steps)
        batches, _ = self.trajectory(count, num_steps)
        trajectories = Trajectories()
        for indices, states in zip(run.batches(count), batches, strict=True):
            watch = trajectories.watch({"network": run.denoiser(network, indices)})
            for x, t, eps in states:
                watch(x.to(self.device), t.to(self.device), eps.to(self.device))
        return trajectories.eps_errors()["network"].mean

    @property
    def full_row(self) -> Row:
        """The row in full precision."""
        return next(row for row in self.table.rows if row.method == FULL)

    @property
    def reference_is_sampled(self) -> bool:
        """Whether the reference consists of full-precision samples with another seed."""
        return self.table.bundled and not self.config.evaluation.reference

    def reference(self) -> str:
        """The reference images: given, from the table, or full-precision samples with another seed."""
        if reference := self.config.evaluation.reference or self.table.reference:
            return reference
        if not self.table.bundled:
            raise ConfigError(f"--reference: expected the reference images of {self.table.name}")
        return str(self.sample_row(self.full_row, self.table.command.seed + REFERENCE_SEED)[1])

    def evaluation(self, reference: str | None = None, against: str | None = None) -> EvaluationConfig:
        """The evaluation of a set of images, with these reference images and full-precision images."""
        given = self.config.evaluation
        return replace(
            given,
            reference=reference,
            against=against,
            extractor=self.extractor,
            crop=given.crop or self.table.crop,
            metrics=given.metrics or self.table.metrics,
            clip=given.clip if self.table.prompts else None,
        )

    def validate_inputs(self) -> None:
        """Raise ConfigError if the reference, captions, extractor or CLIP model cannot be used, before long work."""
        if self.table.captions:
            self.commands.captions(self.count)
        validate_inputs(self.evaluation(None if self.reference_is_sampled else self.reference()))

    def figures(self, row: Row, seed: int) -> dict[str, Any]:
        """The figures of a row for a seed. They are read from its `result.json` if the row is finished."""
        result_file = self.commands.image_folder(row, seed) / "result.json"
        distributed.run_on_first(lambda: self.commands.started(row, seed))  # refuses other weights and options
        key = self._result_key()
        if result_file.is_file() and (result := read_json(result_file)).get("key") == key:
            return result["figures"]
        run, images = self.sample_row(row, seed)
        against = None if row.method == FULL else str(self.sample_row(self.full_row, seed)[1])
        figures = evaluate(self.evaluation(self.reference(), against), images)
        if distributed.rank() == 0:
            if row.method != FULL:
                network = self.network(run, images.parent)
                figures["trajectory_error"] = self.trajectory_error(network, self.config.trajectory_images, None)
                figures["own_widths"] = own_widths(formats_of(network), run.task)
            figures["images_folder"] = str(images)
            write_text(result_file, json.dumps({"key": key, "figures": figures}, indent=1))
        distributed.barrier()
        return figures

    def _result_key(self) -> dict[str, Any]:
        """The settings that a result depends on, besides the images."""
        given = self.config.evaluation
        reference_files = [Path(given.reference)] if given.reference and Path(given.reference).is_file() else []
        return {
            "extractor": self.extractor,
            "weights": str(given.weights),
            "metrics": given.metrics if given.metrics is None else list(given.metrics),
            "reference": given.reference,
            "reference_files": hashes(reference_files),
            "crop": given.crop,
            "clip": str(given.clip),
            "trajectory_images": self.config.trajectory_images,
            "similarity": [field.name for field in fields(ImageSimilarity)],  # a result of another version lacks some
        }

    def ordered_rows(self) -> list[Row]:
        """The rows in the order of work: full precision, then 8-bit activations, whose checkpoints serve the others."""
        return sorted(self.rows, key=lambda row: (row.method != FULL, row.act_bit))

    def unfinished_folders(self) -> set[Path]:
        """The folders of all sets of images that are not sampled and evaluated yet."""
        first_seed = self.table.command.seed
        seeds = [first_seed + i for i in range(self.config.seeds)]
        rows = {self.full_row, *self.rows}  # all rows are compared with full precision
        folders = {self.commands.image_folder(row, seed) for row in rows for seed in seeds}
        folders = {folder for folder in folders if not (folder / "result.json").is_file()}
        reference = self.commands.image_folder(self.full_row, first_seed + REFERENCE_SEED)
        if self.reference_is_sampled and sum(1 for _ in reference.rglob("*.png")) < self.count:
            folders.add(reference)
        return folders

    def estimate(self) -> str:
        """Describe the remaining time, estimated from a trial in full precision on this process."""
        seeds = self.config.seeds
        size = f"{self.table.title}: {len(self.rows)} rows, {self.count} images, {seeds} seed(s)"
        if not (folders := self.unfinished_folders()):
            return f"{size}: nothing left to sample"
        batches, seconds_per_image = self.trajectory(self.config.trajectory_images, None)
        evaluation = seconds_per_image / len(batches[0])  # seconds for one evaluation of the network on one image
        uncalibrated = {
            row.weight_bit: row for row in self.rows if row.method == QDIFF and self.commands.checkpoint(row) is None
        }
        task, calibration = self.full_precision(None).task, 0.0
        for row in uncalibrated.values():
            config = self.commands.quantization(row).resolve(task, self.table.command.seed)
            if config is not None:
                recipe = config.recipe
                calibration += 3 * evaluation * recipe.batch_size * (recipe.iters + recipe.iters_a)
        sampling, processes = seconds_per_image * self.count * len(folders), distributed.world()
        where = f"on this machine ({self.device.type})"
        where += f", before it is shared by {processes} processes" if processes > 1 else ""
        calibrations = f"calibrations ({len(uncalibrated)}) about {format_time(calibration)}"
        return f"{size}: sampling {format_time(sampling)}, {calibrations}, {where}"


def format_time(seconds: float) -> str:
    """A time in hours or minutes, as text."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


# The heading and the number format of each figure.
COLUMNS = CLOSENESS | {
    "fid": ("FID", "{:.2f}"),
    "kid": ("KID x 1000", "{:.2f}"),
    "is": ("IS", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "clip": ("CLIP", "{:.4f}"),
}


def cell(results: Sequence[Mapping[str, Any]], name: str) -> str:
    """The mean of a figure over the seeds as text, with the standard deviation if there are several seeds."""
    values = [figures[name] * (1000 if name == "kid" else 1) for figures in results if name in figures]
    if not values:
        return ""
    number = COLUMNS[name][1]
    spread = f" ± {number.format(torch.tensor(values, dtype=torch.float64).std().item())}" if len(values) > 1 else ""
    return number.format(sum(values) / len(values)) + spread


Results = Mapping[str, Sequence[Mapping[str, Any]]]  # the figures of each seed, by the slug of the row


def row_name(row: Row, results: Sequence[Mapping[str, Any]]) -> str:
    """The name of a row, with the number of layers that have other widths."""
    own = results[0].get("own_widths", "")
    return f"{row.name} ({own})" if own else row.name


def table_cells(run: TableRun, results: Results) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table, as text. Published figures have their own columns."""
    lite0 = " (lite0)" if run.extractor == "lite0" else ""
    names = {name for of_row in results.values() for figures in of_row for name in figures}
    shown = [name for name in COLUMNS if name in names]
    published = list(dict.fromkeys(name for row in run.rows for name in row.published))
    from_extractor = ("fid", "kid", "is", "precision", "recall")
    header = ["setting", *(COLUMNS[name][0] + (lite0 if name in from_extractor else "") for name in shown)]
    header += [f"published {COLUMNS[name][0]}" for name in published]
    rows = [
        [
            row_name(row, results[row.slug]),
            *(cell(results[row.slug], name) for name in shown),
            *(row.published.get(name, "") for name in published),
        ]
        for row in run.rows
        if row.slug in results
    ]
    return header, rows


def validate_reference_kinds(table: str, results: Results) -> None:
    """Raise ConfigError if the references of a table were computed by different evaluators."""
    kinds = {figures.get("reference_kind"): slug for slug, of_row in results.items() for figures in of_row}
    if len(kinds) > 1:
        described = "; ".join(f"{slug}: {kind}" for kind, slug in kinds.items())
        raise ConfigError(f"table {table}: references of {len(kinds)} kinds ({described}); expected one for all rows")


def write_tables(name: str, config: ReproductionConfig, runs: Sequence[TableRun], results: Sequence[Results]) -> None:
    """Write table.md, table.csv, table.json, a grid for each model, and index.html with the tables and the grids.

    Args:
        name: the name of the tables.
        config: how they are filled.
        runs: the tables.
        results: the results of each table so far.
    """
    page, markdown, lines = Page(f"Table: {name}"), [], []
    for run, of_table in zip(runs, results, strict=True):
        if not of_table:
            continue
        header, rows = table_cells(run, of_table)
        validate_reference_kinds(run.table.name, of_table)
        note = _note(run, of_table)
        markdown += [f"### {run.table.title}", "", markdown_table(header, rows), "", note, ""]
        lines += [[run.table.name, *header], *([run.table.name, *row] for row in rows)]
        page.heading(run.table.title)
        page.table(header, rows)
        page.text(note)
        save_image_rows(config.output / f"{run.table.name}.png", _first_images(run, of_table), GRID_IMAGES)
        page.picture(f"{run.table.name}.png", "One row for each setting, from the same noise samples")
    content = {run.table.name: of_table for run, of_table in zip(runs, results, strict=True)}
    write_text(config.output / "table.md", "\n".join(markdown))
    write_text(config.output / "table.json", json.dumps(content, indent=1))
    file = config.output / "table.csv"
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(lines)
    page.write(config.output / "index.html")


def _note(run: TableRun, results: Results) -> str:
    """The note on how to read the table."""
    first = next(iter(results.values()))[0]
    seeds = ", ".join(str(run.table.command.seed + i) for i in range(run.config.seeds))
    note = f"{first['count']} images, seed {seeds}. {first['note']}. "
    note += f"eps error: of {run.config.trajectory_images} images along the trajectory of this sampler. "
    note += SIMILARITY_DEFINITION
    if any(text == DASH for row in run.rows for text in row.published.values()):
        note += f" {DASH}: see {run.table.source} of {PAPER}."
    return note


def _first_images(run: TableRun, results: Results) -> dict[str, Tensor]:
    """The first images of each finished row, by the name of the row."""
    images = {}
    for row in run.rows:
        if row.slug in results:
            files = sorted(Path(results[row.slug][0]["images_folder"]).glob("*.png"))[:GRID_IMAGES]
            images[row.name] = torch.stack([load_png(file) for file in files])
    return images


class TableCheck:
    """Checks in minutes whether the weights, checkpoints and options of a table fit together.

    It prints a line for each row. A row passes if its error is much smaller than that of nearest rounding in the same
    number formats. With 8-bit weights it passes if its error is not much larger. The full-precision weights pass if
    their 8-bit nearest rounding has a small error; this needs no calibrated checkpoint.

    Args:
        table: the table.
    """

    def __init__(self, table: TableRun) -> None:
        self.table, self.run = table, table.full_precision(CHECK_STEPS)
        self.model = self.run.load_full_precision()
        data = self.run.task.make_calibration_set(self.model, CHECK_RECIPE)
        self.data = data.select(CHECK_RECIPE.num_timesteps, CHECK_RECIPE.samples)
        self.verdicts: list[bool] = []
        self.images: dict[str, Tensor] = {}

    @torch.no_grad()
    def passes(self) -> bool:
        """Check all rows, and write a picture of their images. Returns whether all rows pass."""
        self._sample(FULL, self.model)
        error = self._nearest_error(QuantConfig())
        self._judge("full precision", error, CHECK_LIMIT, "of its 8-bit weights by nearest rounding")
        for row in (row for row in self.table.rows if row.method == QDIFF):
            self._check_row(row)
        picture = self.table.config.output / f"check_{self.table.table.name}.png"
        save_image_rows(picture, self.images, GRID_IMAGES)
        print(f"{picture}: {GRID_IMAGES} images of each, {CHECK_STEPS} steps")
        return all(self.verdicts)

    def _check_row(self, row: Row) -> None:
        """Check the calibrated checkpoint of a row, if there is one."""
        commands = self.table.commands
        if (path := commands.checkpoint(row)) is None:
            print(f"{row.name}: no checkpoint to check ({row.file}.safetensors or .pth in --checkpoints)")
            return
        try:
            command = commands.command(row, CHECK_IMAGES, self.table.table.command.seed, commands.folder / "unused")
            run = command.make_run()
            network = self.table.network(run, None)
        except (CheckpointError, ConfigError) as error:
            self.verdicts.append(False)
            print(f"{row.name}: FAIL, {error.with_options(OPTION_OF_FIELD)}", flush=True)
            return
        limit = self._nearest_error(formats_of(network))
        limit *= CHECK_RATIO if row.weight_bit < 8 else 1 / CHECK_RATIO
        self._judge(row.name, self.table.trajectory_error(network, CHECK_IMAGES, CHECK_STEPS), limit, str(path))
        self._sample(row.name, network)

    def _nearest_error(self, quant: QuantConfig) -> float:
        """The trajectory error of nearest rounding."""
        calibration = Calibration(self.model, self.run.task.architecture, quant.linear(), CHECK_RECIPE, self.data)
        return self.table.trajectory_error(calibration.run(), CHECK_IMAGES, CHECK_STEPS)

    def _sample(self, name: str, network: nn.Module) -> None:
        """Sample the images of a row for the picture."""
        images = [self.run.sample(network, batch) for batch in self.run.batches(GRID_IMAGES)]
        self.images[name] = torch.cat(images)

    def _judge(self, name: str, error: float, limit: float, source: str) -> None:
        """Decide whether a row passes, and print a line about it. `source` says what was measured."""
        self.verdicts.append(error < limit)
        verdict = "PASS" if self.verdicts[-1] else "FAIL"
        print(f"{name}: {verdict}, trajectory error {error:.4f} (limit {limit:.4f}), {source}", flush=True)
