"""A table at work: its commands, stages and results, each kept in the table's folder."""

import argparse
import csv
import json
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.calibration.run import nearest_rounding
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.evaluation.page import Page, markdown_table
from qdiff.evaluation.trajectory import Trajectories
from qdiff.utils.files import atomic_write, write_text
from qdiff_cli.comparison import save_rows
from qdiff_cli.evaluation import check_inputs, evaluate, evaluation_parser
from qdiff_cli.images import load_png
from qdiff_cli.options import calibration_config, select_device
from qdiff_cli.quantization import load_calibrated
from qdiff_cli.row_commands import RowCommands, hashes, read_json
from qdiff_cli.running import Ranks
from qdiff_cli.sampling_run import SamplingRun, prepare, run
from qdiff_cli.tables import FROM_MEMORY, FULL, QDIFF, PaperTable, Row

CHECK_LIMIT = 0.1  # trajectory error of 8-bit weights by nearest rounding; the bundled models have 0.006 to 0.011
CHECK_RATIO = 0.85  # of nearest rounding's error, at 4 bits; the bundled checkpoints have 0.3 to 0.7
CHECK_RECIPE = CalibrationConfig(steps=10, samples=8)  # the rows behind the ranges of nearest rounding
CHECK_STEPS, CHECK_IMAGES, GRID_IMAGES = 20, 4, 16
REFERENCE_SEED = (
    1000  # added to a table's seed for the full-precision samples that are the reference where there is no other
)


class TableRun:
    """A table at work in its folder."""

    def __init__(self, table: PaperTable, args: argparse.Namespace) -> None:
        self.table, self.args = table, args
        self.commands = RowCommands(table, args)
        self.folder, self.count, self.rows = self.commands.folder, self.commands.count, self.commands.rows
        self.extractor = args.extractor or ("lite0" if table.bundled else "inception")
        self.device = select_device(args.device)
        self.sampled = cache(self._sampled)
        self.full_precision, self.trajectory = cache(self._full_precision), cache(self._trajectory)

    def _sampled(self, row: Row, seed: int, count: int) -> tuple[SamplingRun, Path]:
        """The job of a row and its images, made or continued."""
        job = prepare(Ranks.from_environment().from_first(lambda: self.commands.command(row, seed, count)))
        return job, run(job)

    def network(self, job: SamplingRun, made: Path | None) -> nn.Module:
        """The simulated quantized network of a row: of the calibration in the run folder `made`, or the checkpoint of its command."""
        path = str(made / "ckpt.safetensors" if made and (made / "ckpt.safetensors").is_file() else job.args.cali_ckpt)
        return load_calibrated(path, job.task, quant_of(job))[0].to(self.device)

    def _full_precision(self, steps: int | None) -> SamplingRun:
        """The full-precision job that trajectories are drawn with; steps: other than the table's, for the check and its grid."""
        words = self.commands.options(
            GRID_IMAGES if steps else self.args.trajectory_images, self.table.seed, self.folder / "unused"
        )
        return prepare(words + ([self.table.steps, str(steps)] if steps else []))

    def _trajectory(self, count: int, steps: int | None) -> tuple[list[list[tuple[Tensor, Tensor, Tensor]]], float]:
        """(x_t, t, eps) of the first images in full precision, by chunk; seconds of an image."""
        job = self.full_precision(steps)
        model = job.task.load().to(self.device).eval()
        chunks = []
        began = time.perf_counter()
        for chunk in tqdm(job.chunks(count), desc="trajectory in full precision", unit="batch"):
            kept: list[tuple[Tensor, Tensor, Tensor]] = []
            job.draw(model, chunk, lambda x, t, eps, kept=kept: kept.append((x.cpu(), t.cpu(), eps.cpu())))
            chunks.append(kept)
        return chunks, (time.perf_counter() - began) / count

    @torch.no_grad()
    def trajectory_error(self, network: nn.Module, count: int, steps: int | None) -> float:
        """Mean relative error of eps over the steps of the full-precision trajectory."""
        job = self.full_precision(steps)
        chunks, _ = self.trajectory(count, steps)
        trajectories = Trajectories()
        for indices, chunk in zip(job.chunks(count), chunks, strict=True):
            watch = trajectories.watch({"it": job.denoiser(network, indices)})
            for x, t, eps in chunk:
                watch(x.to(self.device), t.to(self.device), eps.to(self.device))
        return trajectories.eps_errors()["it"].mean

    def reference(self) -> str:
        """What images are compared with: given, the table's, or full-precision samples of another seed."""
        if self.args.reference or self.table.reference:
            return self.args.reference or self.table.reference
        if not self.table.bundled:
            raise ConfigError(f"--reference: expected the reference images of {self.table.name}")
        row = next(row for row in self.table.rows if row.method == FULL)
        return str(self.sampled(row, self.table.seed + REFERENCE_SEED, self.count)[1])

    def evaluation(self, images: Path, *more: str) -> argparse.Namespace:
        """The options of evaluate.py for a folder of images."""
        args = self.args
        words = [str(images), "--extractor", self.extractor, "--cache", str(args.cache)]
        words += ["--device", args.device, "--threads", str(args.threads)]
        crop = args.crop or self.table.crop
        words += ["--crop", str(crop)] if crop else []
        words += ["--metrics", *(args.metrics or self.table.metrics)]
        words += ["--weights", str(args.weights)] if args.weights else []
        words += ["--clip", str(args.clip)] if args.clip and self.table.prompts else []
        return evaluation_parser("").parse_args([*words, *more])

    def check_inputs(self) -> None:
        """Raise before long work what would be raised after it: no reference, captions, extractor or CLIP model."""
        if not self.table.count:
            self.commands.captions(self.count)
        check_inputs(
            self.evaluation(self.folder, *([] if self.reference_is_sampled() else ["--reference", self.reference()]))
        )

    def figures(self, row: Row, seed: int) -> dict:
        """All figures of a row for a seed, from its `result.json` if it is finished."""
        done = self.commands.place(row, seed, self.count) / "result.json"
        Ranks.from_environment().from_first(
            lambda: self.commands.command(row, seed, self.count)
        )  # refuses other weights and options
        key = {
            "extractor": self.extractor,
            "weights": str(self.args.weights),
            "metrics": self.args.metrics,
            "reference": self.args.reference,
            "reference_files": hashes([str(self.args.reference)]),
            "crop": self.args.crop,
            "clip": str(self.args.clip),
            "trajectory_images": self.args.trajectory_images,
        }
        if done.is_file() and (kept := read_json(done)).get("key") == key:
            return kept["figures"]
        job, images = self.sampled(row, seed, self.count)
        words = ["--reference", self.reference()]
        if row.method != FULL:
            full = next(row for row in self.table.rows if row.method == FULL)
            words += ["--against", str(self.sampled(full, seed, self.count)[1])]
        figures = evaluate(self.evaluation(images, *words), images)
        if Ranks.from_environment().rank == 0:
            if row.method != FULL:
                figures["trajectory_error"] = self.trajectory_error(
                    self.network(job, images.parent), self.args.trajectory_images, None
                )
            figures["images_folder"] = str(images)
            write_text(done, json.dumps({"key": key, "figures": figures}, indent=1))
        Ranks.from_environment().barrier()
        return figures

    def order(self) -> list[Row]:
        """Full precision first, and of the others those with 8-bit activations, whose checkpoints serve the rest."""
        return sorted(self.rows, key=lambda row: (row.method != FULL, row.act_bit))

    def to_sample(self) -> set[Path]:
        """The folders of all sets of images that are not there yet."""
        full = next(row for row in self.table.rows if row.method == FULL)
        seeds = [self.table.seed + i for i in range(self.args.seeds)]
        wanted = {
            self.commands.place(row, seed, self.count) for row in {full, *self.rows} for seed in seeds
        }  # full precision: --against
        wanted = {folder for folder in wanted if not (folder / "result.json").is_file()}
        reference = self.commands.place(full, self.table.seed + REFERENCE_SEED, self.count)
        if self.reference_is_sampled() and sum(1 for _ in reference.rglob("*.png")) < self.count:
            wanted.add(reference)
        return wanted

    def estimate(self) -> str:
        """The time of what is not done, from a trial in full precision on this process."""
        words = f"{self.table.title}: {len(self.rows)} rows, {self.count} images, {self.args.seeds} seed(s)"
        if not (folders := self.to_sample()):
            return f"{words}: nothing left to sample"
        chunks, each = self.trajectory(self.args.trajectory_images, None)
        row_seconds = each / len(chunks[0])  # one evaluation for one image
        missing = {
            row.weight_bit: row for row in self.rows if row.method == QDIFF and self.commands.checkpoint(row) is None
        }
        fitting = 0.0
        for row in missing.values():
            recipe = calibration_config(self.commands.calibration(row), self.full_precision(None).task.evaluations)
            fitting += 3 * row_seconds * recipe.batch_size * (recipe.iters + recipe.iters_a)
        sampling = each * self.count * len(folders)
        processes = Ranks.from_environment().world
        where = f"on this machine ({self.device.type})" + (
            f", before it is shared by {processes} processes" if processes > 1 else ""
        )
        return f"{words}: sampling {hours(sampling)}, calibrations ({len(missing)}) about {hours(fitting)}, {where}"

    def reference_is_sampled(self) -> bool:
        return self.table.bundled and not self.args.reference


def quant_of(job: SamplingRun) -> QuantConfig:
    """The number formats of a quantized job."""
    args = job.args
    return QuantConfig(args.weight_bit, args.act_bit, args.quant_act, args.sm_abit, args.a_sym, args.split)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


# --- results

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


def cells(found: list[dict], name: str) -> str:
    """The mean over the seeds, with their spread where there are several."""
    values = [figures[name] * (1000 if name == "kid" else 1) for figures in found if name in figures]
    if not values:
        return ""
    form = COLUMNS[name][1]
    spread = f" ± {form.format(torch.tensor(values).std().item())}" if len(values) > 1 else ""
    return form.format(sum(values) / len(values)) + spread


def table_of(work: TableRun, found: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; published figures have columns of their own."""
    lite0 = " (lite0)" if work.extractor == "lite0" else ""
    shown = [name for name in COLUMNS if any(name in figures for many in found.values() for figures in many)]
    published = list(dict.fromkeys(name for row in work.rows for name in row.published))
    header = [
        "setting",
        *(COLUMNS[name][0] + (lite0 if name in ("fid", "kid", "is", "precision", "recall") else "") for name in shown),
    ]
    header += [f"published {COLUMNS[name][0]}" for name in published]
    rows = [
        [
            row.name,
            *(cells(found[row.slug], name) for name in shown),
            *(row.published.get(name, "") for name in published),
        ]
        for row in work.rows
        if row.slug in found
    ]
    return header, rows


def expect_one_kind(table: str, found: dict[str, list[dict]]) -> None:
    """Raise ConfigError where figures of a table come from references that other evaluators' resize or weights have made."""
    kinds = {figures.get("reference_kind"): slug for slug, many in found.items() for figures in many}
    if len(kinds) > 1:
        words = "; ".join(f"{slug}: {kind}" for kind, slug in kinds.items())
        raise ConfigError(f"table {table}: references of {len(kinds)} kinds ({words}); expected one for all rows")


def write_tables(args: argparse.Namespace, works: list[TableRun], results: list[dict[str, list[dict]]]) -> None:
    """table.md, table.csv, table.json, a grid for each model, and index.html with all of it."""
    page, markdown, lines = Page(f"Table: {args.table}"), [], []
    for work, found in zip(works, results, strict=True):
        if not found:
            continue
        header, rows = table_of(work, found)
        expect_one_kind(work.table.name, found)
        note = next(iter(found.values()))[0]["note"]
        seeds = ", ".join(str(work.table.seed + i) for i in range(args.seeds))
        words = f"{next(iter(found.values()))[0]['count']} images, seed {seeds}. {note}. "
        words += f"eps error: of {args.trajectory_images} images along the trajectory of this sampler."
        words += f" {FROM_MEMORY}." if any("*" in text for row in work.rows for text in row.published.values()) else ""
        markdown += [f"### {work.table.title}", "", markdown_table(header, rows), "", words, ""]
        lines += [[work.table.name, *header], *([work.table.name, *row] for row in rows)]
        page.heading(work.table.title)
        page.table(header, rows)
        page.text(words)
        pictures = {
            row.name: torch.stack(
                [
                    load_png(file)
                    for file in sorted(Path(found[row.slug][0]["images_folder"]).glob("*.png"))[:GRID_IMAGES]
                ]
            )
            for row in work.rows
            if row.slug in found
        }
        save_rows(args.output / f"{work.table.name}.png", pictures, GRID_IMAGES)
        page.picture(f"{work.table.name}.png", "One row for each setting, the same noises")
    for name, text in {
        "table.md": "\n".join(markdown),
        "table.json": json.dumps(
            {work.table.name: found for work, found in zip(works, results, strict=True)}, indent=1
        ),
    }.items():
        write_text(args.output / name, text)
    with (
        atomic_write(args.output / "table.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows(lines)
    page.write(args.output / "index.html")


def check(work: TableRun) -> bool:
    """Whether weights, checkpoints and options fit together; prints a line for each row.

    A row passes if it is much closer to full precision than nearest rounding in the same number formats (8-bit weights: not
    much farther). Where there is no calibrated checkpoint, 8-bit nearest rounding must be close: it tells about the weights alone.
    """
    job = work.full_precision(CHECK_STEPS)
    model = job.task.load().to(work.device).eval()
    rows = job.task.generate(model, CHECK_RECIPE).select(CHECK_RECIPE.steps, CHECK_RECIPE.samples)
    verdicts, pictures = [], {}

    def nearest(quant: QuantConfig) -> float:
        return work.trajectory_error(
            nearest_rounding(model, job.task.family, quant, CHECK_RECIPE, rows), CHECK_IMAGES, CHECK_STEPS
        )

    def sample(name: str, network: nn.Module) -> None:
        pictures[name] = torch.cat([job.sample(network, chunk) for chunk in job.chunks(GRID_IMAGES)])

    def verdict(name: str, error: float, limit: float, more: object) -> None:
        verdicts.append(error < limit)
        print(
            f"{name}: {'PASS' if verdicts[-1] else 'FAIL'}, trajectory error {error:.4f} (limit {limit:.4f}), {more}",
            flush=True,
        )

    with torch.no_grad():
        sample(FULL, model)
        verdict("full precision", nearest(QuantConfig()), CHECK_LIMIT, "of its 8-bit weights by nearest rounding")
        for row in (row for row in work.rows if row.method == QDIFF):
            if (path := work.commands.checkpoint(row)) is None:
                print(f"{row.name}: no checkpoint to check ({row.file}.safetensors or .pth in --checkpoints)")
                continue
            try:
                made = prepare(
                    work.commands.options(CHECK_IMAGES, work.table.seed, work.folder / "unused")
                    + work.commands.quantization(row)
                )
                network = work.network(made, None)
            except (CheckpointError, ConfigError) as error:
                verdicts.append(False)
                print(f"{row.name}: FAIL, {error}", flush=True)
                continue
            limit = nearest(quant_of(made)) * (CHECK_RATIO if row.weight_bit < 8 else 1 / CHECK_RATIO)
            verdict(row.name, work.trajectory_error(network, CHECK_IMAGES, CHECK_STEPS), limit, path)
            sample(row.name, network)
    save_rows(work.args.output / f"check_{work.table.name}.png", pictures, GRID_IMAGES)
    print(f"{work.args.output / f'check_{work.table.name}.png'}: {GRID_IMAGES} images of each, {CHECK_STEPS} steps")
    return all(verdicts)
