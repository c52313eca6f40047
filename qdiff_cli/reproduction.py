"""A table at work: its commands and results, each kept in the table's folder; the check before a long run."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from qdiff.evaluation.trajectory import Trajectories
from qdiff.utils import distributed
from qdiff.utils.files import atomic_write, write_text
from qdiff_cli.comparison import save_rows
from qdiff_cli.evaluation import EvaluationConfig, evaluate, validate_inputs
from qdiff_cli.images import load_png
from qdiff_cli.options import OPTION_OF_FIELD, DeviceOptions
from qdiff_cli.quantization import PACKED, load_calibrated
from qdiff_cli.sampling_run import SamplingRun
from qdiff_cli.table_commands import TableCommands, hashes, read_json
from qdiff_cli.tables import DASH, FULL, QDIFF, PaperTable, Row

CHECK_LIMIT = 0.1  # trajectory error of 8-bit weights by nearest rounding; the bundled models have 0.006 to 0.011
CHECK_RATIO = 0.85  # of nearest rounding's error, at 4 bits; the bundled checkpoints have 0.3 to 0.7
CHECK_RECIPE = CalibrationConfig(num_timesteps=10, samples=8)  # the samples behind the ranges of nearest rounding
CHECK_STEPS, CHECK_IMAGES, GRID_IMAGES = 20, 4, 16
REFERENCE_SEED = 1000  # added to a table's seed for the full-precision samples that serve as the reference
PAPER = "arXiv 2302.04304"


@dataclass(frozen=True)
class ReproductionConfig:
    """How the tables are filled.

    Attributes:
        output: the folder of all tables.
        seeds: every row is sampled with this number of seeds.
        trajectory_images: images that the trajectory error is measured on.
        evaluation: the options of the evaluation that were given; others are those of the table.
        extractor: inception or lite0; None: that of the table.
        device: where the networks work.
    """

    output: Path
    seeds: int
    trajectory_images: int
    evaluation: EvaluationConfig
    extractor: str | None
    device: DeviceOptions


class TableRun:
    """A table at work in its folder.

    Args:
        commands: the commands of its rows.
        config: how it is filled.
        device: where the networks work.
    """

    def __init__(self, commands: TableCommands, config: ReproductionConfig, device: torch.device) -> None:
        self.commands, self.config, self.device = commands, config, device
        self.table: PaperTable = commands.table
        self.folder, self.count, self.rows = commands.folder, commands.count, commands.rows
        self.extractor = config.extractor or ("lite0" if self.table.bundled else "inception")
        self.sampled = cache(self._sampled)
        self.full_precision, self.trajectory = cache(self._full_precision), cache(self._trajectory)

    def _sampled(self, row: Row, seed: int) -> tuple[SamplingRun, Path]:
        """The run of a row and its images, sampled or continued."""
        run = distributed.run_on_first(lambda: self.commands.started(row, seed)).make_run()
        return run, run.execute()

    def network(self, run: SamplingRun, folder: Path | None) -> nn.Module:
        """The simulated quantized network of a run: of the calibration in its folder, or the checkpoint it loads."""
        quantization = run.quantization
        assert quantization is not None  # rows in full precision have no quantized network
        calibrated = None if folder is None else folder / PACKED
        path = calibrated if calibrated is not None and calibrated.is_file() else quantization.checkpoint
        assert path is not None  # a run without a checkpoint has calibrated one
        formats = replace(quantization.formats, quant_mode="qdiff")  # the file says how it was calibrated
        return load_calibrated(path, run.task, formats).to(self.device)

    def _full_precision(self, num_steps: int | None) -> SamplingRun:
        """The full-precision run that trajectories are drawn with.

        Args:
            num_steps: other sampling steps than the table's, for the check and its grid.
        """
        count = GRID_IMAGES if num_steps else self.config.trajectory_images
        command = self.commands.full_precision(count, self.table.command.seed, self.folder / "unused")
        return (command.with_num_steps(num_steps) if num_steps else command).make_run()

    def _trajectory(self, count: int, num_steps: int | None) -> tuple[list[list[tuple[Tensor, Tensor, Tensor]]], float]:
        """(x_t, t, eps) of the first images in full precision, by batch; seconds of an image."""
        run = self.full_precision(num_steps)
        model = run.load_full_precision()
        batches = []
        began = time.perf_counter()
        for batch in tqdm(run.batches(count), desc="trajectory in full precision", unit="batch"):
            states: list[tuple[Tensor, Tensor, Tensor]] = []

            def remember(x: Tensor, t: Tensor, eps: Tensor, states: list = states) -> None:
                states.append((x.cpu(), t.cpu(), eps.cpu()))

            run.sample_latents(model, batch, remember)
            batches.append(states)
        return batches, (time.perf_counter() - began) / count

    @torch.no_grad()
    def trajectory_error(self, network: nn.Module, count: int, num_steps: int | None) -> float:
        """Mean relative error of eps over the steps of the full-precision trajectory."""
        run = self.full_precision(num_steps)
        batches, _ = self.trajectory(count, num_steps)
        trajectories = Trajectories()
        for indices, states in zip(run.batches(count), batches, strict=True):
            watch = trajectories.watch({"it": run.denoiser(network, indices)})
            for x, t, eps in states:
                watch(x.to(self.device), t.to(self.device), eps.to(self.device))
        return trajectories.eps_errors()["it"].mean

    @property
    def full_row(self) -> Row:
        """The row in full precision."""
        return next(row for row in self.table.rows if row.method == FULL)

    @property
    def reference_is_sampled(self) -> bool:
        """Whether the reference is made of full-precision samples of another seed."""
        return self.table.bundled and not self.config.evaluation.reference

    def reference(self) -> str:
        """What images are compared with: given, the table's, or full-precision samples of another seed."""
        if found := self.config.evaluation.reference or self.table.reference:
            return found
        if not self.table.bundled:
            raise ConfigError(f"--reference: expected the reference images of {self.table.name}")
        return str(self.sampled(self.full_row, self.table.command.seed + REFERENCE_SEED)[1])

    def evaluation(self, reference: str | None = None, against: str | None = None) -> EvaluationConfig:
        """How a set of images is evaluated."""
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
        """Raise before long work what would be raised after it: no reference, captions, extractor or CLIP model."""
        if self.table.captions:
            self.commands.captions(self.count)
        validate_inputs(self.evaluation(None if self.reference_is_sampled else self.reference()))

    def figures(self, row: Row, seed: int) -> dict[str, Any]:
        """All figures of a row for a seed, from its `result.json` if it is finished."""
        finished = self.commands.place(row, seed) / "result.json"
        distributed.run_on_first(lambda: self.commands.started(row, seed))  # refuses other weights and options
        key = self._result_key()
        if finished.is_file() and (kept := read_json(finished)).get("key") == key:
            return kept["figures"]
        run, images = self.sampled(row, seed)
        against = None if row.method == FULL else str(self.sampled(self.full_row, seed)[1])
        figures = evaluate(self.evaluation(self.reference(), against), images)
        if distributed.rank() == 0:
            if row.method != FULL:
                network = self.network(run, images.parent)
                figures["trajectory_error"] = self.trajectory_error(network, self.config.trajectory_images, None)
            figures["images_folder"] = str(images)
            write_text(finished, json.dumps({"key": key, "figures": figures}, indent=1))
        distributed.barrier()
        return figures

    def _result_key(self) -> dict[str, Any]:
        """What a result depends on beside the images."""
        given = self.config.evaluation
        reference = [Path(given.reference)] if given.reference and Path(given.reference).is_file() else []
        return {
            "extractor": self.extractor,
            "weights": str(given.weights),
            "metrics": given.metrics if given.metrics is None else list(given.metrics),
            "reference": given.reference,
            "reference_files": hashes(reference),
            "crop": given.crop,
            "clip": str(given.clip),
            "trajectory_images": self.config.trajectory_images,
        }

    def order(self) -> list[Row]:
        """Full precision first, then rows with 8-bit activations, whose checkpoints serve the others."""
        return sorted(self.rows, key=lambda row: (row.method != FULL, row.act_bit))

    def to_sample(self) -> set[Path]:
        """The folders of all sets of images that are not there yet."""
        first = self.table.command.seed
        seeds = [first + i for i in range(self.config.seeds)]
        rows = {self.full_row, *self.rows}  # all rows are compared with full precision
        wanted = {self.commands.place(row, seed) for row in rows for seed in seeds}
        wanted = {folder for folder in wanted if not (folder / "result.json").is_file()}
        reference = self.commands.place(self.full_row, first + REFERENCE_SEED)
        if self.reference_is_sampled and sum(1 for _ in reference.rglob("*.png")) < self.count:
            wanted.add(reference)
        return wanted

    def estimate(self) -> str:
        """The time of what is not done, from a trial in full precision on this process."""
        seeds = self.config.seeds
        begin = f"{self.table.title}: {len(self.rows)} rows, {self.count} images, {seeds} seed(s)"
        if not (folders := self.to_sample()):
            return f"{begin}: nothing left to sample"
        batches, each = self.trajectory(self.config.trajectory_images, None)
        evaluation = each / len(batches[0])  # of the network for one image
        missing = {
            row.weight_bit: row for row in self.rows if row.method == QDIFF and self.commands.checkpoint(row) is None
        }
        task, fitting = self.full_precision(None).task, 0.0
        for row in missing.values():
            config = self.commands.quantization(row).resolve(task, self.table.command.seed)
            if config is not None:
                recipe = config.recipe
                fitting += 3 * evaluation * recipe.batch_size * (recipe.iters + recipe.iters_a)
        sampling, processes = each * self.count * len(folders), distributed.world()
        where = f"on this machine ({self.device.type})"
        where += f", before it is shared by {processes} processes" if processes > 1 else ""
        return f"{begin}: sampling {hours(sampling)}, calibrations ({len(missing)}) about {hours(fitting)}, {where}"


def hours(seconds: float) -> str:
    """A time to read."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


COLUMNS = {
    "trajectory_error": ("eps error", "{:.4f}"),
    "psnr": ("PSNR dB", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "perceptual": ("perceptual (lite0)", "{:.3f}"),
    "fid": ("FID", "{:.2f}"),
    "kid": ("KID x 1000", "{:.2f}"),
    "is": ("IS", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "clip": ("CLIP", "{:.4f}"),
}


def cell(found: Sequence[Mapping[str, Any]], name: str) -> str:
    """The mean of a figure over the seeds, with their spread if there are several."""
    values = [figures[name] * (1000 if name == "kid" else 1) for figures in found if name in figures]
    if not values:
        return ""
    form = COLUMNS[name][1]
    spread = f" ± {form.format(torch.tensor(values).std().item())}" if len(values) > 1 else ""
    return form.format(sum(values) / len(values)) + spread


Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by the slug of a row, the figures of each seed


def table_of(run: TableRun, found: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows; published figures have columns of their own."""
    lite0 = " (lite0)" if run.extractor == "lite0" else ""
    shown = [name for name in COLUMNS if any(name in figures for many in found.values() for figures in many)]
    published = list(dict.fromkeys(name for row in run.rows for name in row.published))
    of_extractor = ("fid", "kid", "is", "precision", "recall")
    header = ["setting", *(COLUMNS[name][0] + (lite0 if name in of_extractor else "") for name in shown)]
    header += [f"published {COLUMNS[name][0]}" for name in published]
    rows = [
        [
            row.name,
            *(cell(found[row.slug], name) for name in shown),
            *(row.published.get(name, "") for name in published),
        ]
        for row in run.rows
        if row.slug in found
    ]
    return header, rows


def expect_one_kind(table: str, found: Results) -> None:
    """Raise ConfigError if figures of a table come from references of other evaluators' resize or weights."""
    kinds = {figures.get("reference_kind"): slug for slug, many in found.items() for figures in many}
    if len(kinds) > 1:
        places = "; ".join(f"{slug}: {kind}" for kind, slug in kinds.items())
        raise ConfigError(f"table {table}: references of {len(kinds)} kinds ({places}); expected one for all rows")


def write_tables(name: str, config: ReproductionConfig, runs: Sequence[TableRun], results: Sequence[Results]) -> None:
    """Write table.md, table.csv, table.json, a grid for each model, and index.html with all of it."""
    page, markdown, lines = Page(f"Table: {name}"), [], []
    for run, found in zip(runs, results, strict=True):
        if not found:
            continue
        header, rows = table_of(run, found)
        expect_one_kind(run.table.name, found)
        note = _note(run, found)
        markdown += [f"### {run.table.title}", "", markdown_table(header, rows), "", note, ""]
        lines += [[run.table.name, *header], *([run.table.name, *row] for row in rows)]
        page.heading(run.table.title)
        page.table(header, rows)
        page.text(note)
        save_rows(config.output / f"{run.table.name}.png", _pictures(run, found), GRID_IMAGES)
        page.picture(f"{run.table.name}.png", "One row for each setting, the same noises")
    content = {run.table.name: found for run, found in zip(runs, results, strict=True)}
    write_text(config.output / "table.md", "\n".join(markdown))
    write_text(config.output / "table.json", json.dumps(content, indent=1))
    file = config.output / "table.csv"
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(lines)
    page.write(config.output / "index.html")


def _note(run: TableRun, found: Results) -> str:
    """What a reader of the table must know."""
    first = next(iter(found.values()))[0]
    seeds = ", ".join(str(run.table.command.seed + i) for i in range(run.config.seeds))
    note = f"{first['count']} images, seed {seeds}. {first['note']}. "
    note += f"eps error: of {run.config.trajectory_images} images along the trajectory of this sampler."
    if any(text == DASH for row in run.rows for text in row.published.values()):
        note += f" {DASH}: see {run.table.source} of {PAPER}."
    return note


def _pictures(run: TableRun, found: Results) -> dict[str, Tensor]:
    """The first images of each row."""
    pictures = {}
    for row in run.rows:
        if row.slug in found:
            files = sorted(Path(found[row.slug][0]["images_folder"]).glob("*.png"))[:GRID_IMAGES]
            pictures[row.name] = torch.stack([load_png(file) for file in files])
    return pictures


class Check:
    """Whether weights, checkpoints and options of a table fit together; prints a line for each row.

    A row passes if it is much closer to full precision than nearest rounding in the same number formats (8-bit
    weights: not much farther). Without a calibrated checkpoint, 8-bit nearest rounding must be close: it tells about
    the weights alone.

    Args:
        table: the table.
    """

    def __init__(self, table: TableRun) -> None:
        self.table, self.run = table, table.full_precision(CHECK_STEPS)
        self.model = self.run.load_full_precision()
        data = self.run.task.make_calibration_set(self.model, CHECK_RECIPE)
        self.data = data.select(CHECK_RECIPE.num_timesteps, CHECK_RECIPE.samples)
        self.verdicts: list[bool] = []
        self.pictures: dict[str, Tensor] = {}

    @torch.no_grad()
    def passes(self) -> bool:
        """Check all rows, and write a picture of them."""
        self._sample(FULL, self.model)
        error = self._nearest_error(QuantConfig())
        self._judge("full precision", error, CHECK_LIMIT, "of its 8-bit weights by nearest rounding")
        for row in (row for row in self.table.rows if row.method == QDIFF):
            self._check_row(row)
        picture = self.table.config.output / f"check_{self.table.table.name}.png"
        save_rows(picture, self.pictures, GRID_IMAGES)
        print(f"{picture}: {GRID_IMAGES} images of each, {CHECK_STEPS} steps")
        return all(self.verdicts)

    def _check_row(self, row: Row) -> None:
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
        assert run.quantization is not None  # the row is quantized
        limit = self._nearest_error(run.quantization.formats)
        limit *= CHECK_RATIO if row.weight_bit < 8 else 1 / CHECK_RATIO
        self._judge(row.name, self.table.trajectory_error(network, CHECK_IMAGES, CHECK_STEPS), limit, str(path))
        self._sample(row.name, network)

    def _nearest_error(self, quant: QuantConfig) -> float:
        calibration = Calibration(self.model, self.run.task.architecture, quant, CHECK_RECIPE, self.data)
        return self.table.trajectory_error(calibration.nearest(), CHECK_IMAGES, CHECK_STEPS)

    def _sample(self, name: str, network: nn.Module) -> None:
        images = [self.run.sample(network, batch) for batch in self.run.batches(GRID_IMAGES)]
        self.pictures[name] = torch.cat(images)

    def _judge(self, name: str, error: float, limit: float, more: str) -> None:
        self.verdicts.append(error < limit)
        verdict = "PASS" if self.verdicts[-1] else "FAIL"
        print(f"{name}: {verdict}, trajectory error {error:.4f} (limit {limit:.4f}), {more}", flush=True)
