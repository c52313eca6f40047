"""A table at work: its commands, stages and results, each kept in the table's folder."""

import argparse
import csv
import json
import random
import shlex
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from common.comparison import save_rows
from common.evaluation import check_inputs, evaluate, evaluation_parser
from common.images import load_png
from common.job import Job, prepare, run
from common.options import select_device
from common.quantize import load_calibrated
from common.running import Ranks
from common.tables import FROM_MEMORY, FULL, LINEAR, QDIFF, Row, Table
from qdiff.analysis import Trajectories
from qdiff.config import PRESETS, ConfigError, QuantConfig
from qdiff.evaluation.page import Page, markdown_table
from qdiff.files import atomic_write

CHECK_LIMIT = 0.3  # trajectory error; the embedded calibrated checkpoints have 0.01 to 0.15
CHECK_STEPS, CHECK_IMAGES, GRID_IMAGES = 20, 4, 16
REFERENCE_SEED = 1000  # added to a table's seed for the full-precision samples that are the reference where there is no other


class Work:
    """A table at work in its folder."""

    def __init__(self, table: Table, args: argparse.Namespace) -> None:
        self.table, self.args = table, args
        self.folder = args.output / table.name
        self.count = args.images or table.images
        self.extractor = args.extractor or ("lite0" if table.embedded else "inception")
        self.rows = self._selected(args.rows)
        self.device = select_device(args.device)
        self.captions, self.sampled = cache(self._captions), cache(self._sampled)
        self.full_precision, self.trajectory = cache(self._full_precision), cache(self._trajectory)

    def _selected(self, names: list[str] | None) -> list[Row]:
        known = {row.slug: row for row in self.table.rows}
        unknown = [name for name in names or [] if name not in known]
        if unknown:
            raise ConfigError(f"--rows {' '.join(unknown)}: expected some of {', '.join(known)}")
        return [row for name, row in known.items() if names is None or name in names]

    # --- commands

    def options(self, count: int, seed: int, folder: Path) -> list[str]:
        table, args = self.table, self.args
        words = [*shlex.split(table.command), "--seed", str(seed), table.logdir, str(folder)]
        words += ["--device", args.device, "--threads", str(args.threads)]
        words += [table.count, str(-(-count // table.images_each))] if table.count else ["--from-file", str(self.captions(count))]
        return words + args.more

    def quantization(self, row: Row) -> list[str]:
        """The options of a row: how its network is quantized, and where the result comes from."""
        if row.method == FULL:
            return []
        words = ["--ptq", "--weight_bit", str(row.weight_bit), *shlex.split(self.table.weights)]
        words += shlex.split(self.table.acts) if row.act_bit < 32 else []
        found = self.checkpoint(row)
        if found is not None:
            return [*words, "--quant_mode", QDIFF_MODE[row.method], "--cali_ckpt", str(found)]
        calibration = [*shlex.split(self.table.calibration), *(["--preset", self.args.preset] if self.args.preset else [])]
        drawn = sorted(self.folder.rglob("calibration_set.pt"))  # by another row, of the same rows
        calibration += ["--cali_data_path", str(drawn[0])] if drawn else []
        return [*words, "--quant_mode", QDIFF_MODE[row.method], *calibration]

    def given_checkpoint(self, row: Row) -> Path | None:
        """The calibrated checkpoint for a row in --checkpoints or beside the embedded model."""
        for folder in (self.args.checkpoints, self.table.checkpoints) if row.method == QDIFF else ():
            for name in (row.file, f"w{row.weight_bit}a8") if folder else ():
                for suffix in (".safetensors", ".pth"):
                    if (folder / (name + suffix)).is_file():
                        return folder / (name + suffix)
        return None

    def checkpoint(self, row: Row) -> Path | None:
        """A calibrated checkpoint for a row: given, or of an earlier calibration of the same weights here."""
        if (given := self.given_checkpoint(row)) is not None:
            return given
        same = [other for other in self.table.rows if (other.method, other.weight_bit) == (row.method, row.weight_bit)]
        same = [row] + [other for other in same if other.act_bit == 8 and row.method == QDIFF]
        found = [path for other in same for path in sorted((self.folder / other.slug).rglob("ckpt.safetensors"))]
        return found[0] if found else None

    def _captions(self, count: int) -> Path:
        """A file of `count` captions, drawn once from the annotation file in a fixed order."""
        if self.args.captions is None:
            raise ConfigError("--captions: expected COCO's annotation file (captions_val2014.json)")
        try:
            entries = json.loads(self.args.captions.read_text(encoding="utf-8"))["annotations"]
            words = [" ".join(str(entry["caption"]).split()) for entry in sorted(entries, key=lambda entry: entry["id"])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--captions {self.args.captions}: not a COCO caption file ({error!r})") from None
        words = [text for text in words if text]
        if len(words) < count:
            raise ConfigError(f"--captions {self.args.captions}: {len(words)} captions, expected at least {count}")
        path = self.folder / f"captions-{count}.txt"
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join(random.Random(0).sample(words, count)) + "\n", encoding="utf-8")
        return path

    # --- stages

    def _sampled(self, row: Row, seed: int, count: int) -> tuple[Job, Path]:
        """The job of a row and its images, made or continued; the command of the first time is kept and used again."""
        folder = self.folder / row.slug / f"seed{seed}-{count}"

        def command() -> list[str]:
            kept, options = folder / "command.json", self.options(count, seed, folder)
            if not kept.is_file():
                with atomic_write(kept) as temporary:
                    temporary.write_text(json.dumps(options + self.quantization(row)))
            words = json.loads(kept.read_text())
            if ((given := self.given_checkpoint(row)) and str(given) not in words) or words[: len(options)] != options:
                raise ConfigError(f"{folder}: begun with other options ({shlex.join(words)}); remove it, or take another --output")
            return words + (["--continue"] if any(folder.rglob("run.json")) else [])

        job = prepare(Ranks.from_environment().from_first(command))
        return job, run(job)

    def network(self, job: Job, made: Path | None) -> nn.Module:
        """The simulated quantized network of a row: of the calibration in the run folder `made`, or the checkpoint of its command."""
        path = str(made / "ckpt.safetensors" if made and (made / "ckpt.safetensors").is_file() else job.args.cali_ckpt)
        quant = QuantConfig(job.args.weight_bit, job.args.act_bit, job.args.quant_act, job.args.sm_abit, job.args.a_sym, job.args.split)
        return load_calibrated(path, job.task, quant)[0].to(self.device)

    def _full_precision(self, steps: int | None) -> Job:
        """The full-precision job that trajectories are drawn with; steps: other than the table's."""
        words = self.options(self.args.trajectory_images, self.table.seed, self.folder / "unused")
        return prepare(words + ([self.table.steps, str(steps)] if steps else []))

    def _trajectory(self, count: int, steps: int | None) -> tuple[list[list[tuple[Tensor, Tensor, Tensor]]], float]:
        """(x_t, t, eps) of the first images in full precision, by chunk; seconds of an image."""
        job = self.full_precision(steps)
        model = job.task.load().to(self.device).eval()
        chunks = []
        began = time.perf_counter()
        for chunk in job.chunks(count):
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
        if not self.table.embedded:
            raise ConfigError(f"--reference: expected the reference images of {self.table.name}")
        row = next(row for row in self.table.rows if row.method == FULL)
        return str(self.sampled(row, self.table.seed + REFERENCE_SEED, self.count)[1])

    def evaluation(self, images: Path, *more: str) -> argparse.Namespace:
        """The options of evaluate.py for a folder of images."""
        args = self.args
        words = [str(images), "--extractor", self.extractor, "--cache", str(args.cache)]
        words += ["--device", args.device, "--threads", str(args.threads)]
        words += ["--crop", str(self.table.crop)] if self.table.crop else []
        words += ["--metrics", *self.table.metrics]
        words += ["--clip", str(args.clip)] if args.clip else []
        return evaluation_parser("").parse_args([*words, *more])

    def check_inputs(self) -> None:
        """Raise before long work what would be raised after it: no reference, captions, extractor or CLIP model."""
        if not self.table.count:
            self.captions(self.count)
        check_inputs(self.evaluation(self.folder, *([] if self.reference_is_sampled() else ["--reference", self.reference()])))

    def figures(self, row: Row, seed: int) -> dict:
        """All figures of a row for a seed, from its `result.json` if it is finished."""
        done = self.folder / row.slug / f"seed{seed}-{self.count}" / "result.json"
        given = self.given_checkpoint(row)
        key = {
            "checkpoint": given and str(given),
            "extractor": self.extractor,
            "reference": self.args.reference,
            "clip": str(self.args.clip),
            "trajectory_images": self.args.trajectory_images,
        }
        if done.is_file() and (kept := json.loads(done.read_text()))["key"] == key:
            return kept["figures"]
        job, images = self.sampled(row, seed, self.count)
        words = ["--reference", self.reference()]
        if row.method != FULL:
            full = next(row for row in self.table.rows if row.method == FULL)
            words += ["--against", str(self.sampled(full, seed, self.count)[1])]
        figures = evaluate(self.evaluation(images, *words), images)
        if Ranks.from_environment().rank == 0:
            if row.method != FULL:
                figures["trajectory_error"] = self.trajectory_error(self.network(job, images.parent), self.args.trajectory_images, None)
            figures["images_folder"] = str(images)
            with atomic_write(done) as temporary:
                temporary.write_text(json.dumps({"key": key, "figures": figures}, indent=1))
        Ranks.from_environment().barrier()
        return figures

    def order(self) -> list[Row]:
        """Full precision first, and of the others those with 8-bit activations, whose checkpoints serve the rest."""
        return sorted(self.rows, key=lambda row: (row.method != FULL, row.act_bit))

    def estimate(self) -> str:
        """The time of everything, from a trial in full precision."""
        chunks, each = self.trajectory(self.args.trajectory_images, None)
        job = self.full_precision(None)
        sampling = each * self.count * (len(self.rows) * self.args.seeds + self.reference_is_sampled())
        row_seconds = each / len(chunks[0])  # one evaluation for one image
        recipe = PRESETS[self.args.preset or ("fast" if self.table.embedded else "published")]
        missing = {row.weight_bit for row in self.rows if row.method == QDIFF and self.checkpoint(row) is None}
        fitting = len(missing) * 3 * row_seconds * recipe.batch_size * (recipe.iters + recipe.iters_a)
        words = f"sampling {hours(sampling)}, calibrations ({len(missing)}) about {hours(fitting)}, on this machine"
        return f"{self.table.title}: {len(self.rows)} rows, {self.count} images, {self.args.seeds} seed(s): {words} ({job.device.type})"

    def reference_is_sampled(self) -> bool:
        return self.table.embedded and not self.args.reference


QDIFF_MODE = {QDIFF: "qdiff", LINEAR: "linear"}


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


# --- results

COLUMNS = {
    "trajectory_error": ("eps error", "{:.4f}"),
    "psnr": ("PSNR dB", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "perceptual": ("perceptual", "{:.3f}"),
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


def table_of(work: Work, found: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; published figures have columns of their own."""
    lite0 = " (lite0)" if work.extractor == "lite0" else ""
    shown = [name for name in COLUMNS if any(name in figures for many in found.values() for figures in many)]
    published = list(dict.fromkeys(name for row in work.rows for name in row.published))
    header = ["setting", *(COLUMNS[name][0] + (lite0 if name in ("fid", "kid", "is", "precision", "recall") else "") for name in shown)]
    header += [f"published {COLUMNS[name][0]}" for name in published]
    rows = [
        [row.name, *(cells(found[row.slug], name) for name in shown), *(row.published.get(name, "") for name in published)]
        for row in work.rows
        if row.slug in found
    ]
    return header, rows


def write_tables(args: argparse.Namespace, works: list[Work], results: list[dict[str, list[dict]]]) -> None:
    """table.md, table.csv, table.json, a grid for each model, and index.html with all of it."""
    page, markdown, lines = Page(f"Table: {args.table}"), [], []
    for work, found in zip(works, results, strict=True):
        if not found:
            continue
        header, rows = table_of(work, found)
        note = next(iter(found.values()))[0]["note"]
        seeds = ", ".join(str(work.table.seed + i) for i in range(args.seeds))
        words = f"{work.count} images, seed {seeds}. {note}."
        words += f" {FROM_MEMORY}." if any("*" in text for row in work.rows for text in row.published.values()) else ""
        markdown += [f"### {work.table.title}", "", markdown_table(header, rows), "", words, ""]
        lines += [[work.table.name, *header], *([work.table.name, *row] for row in rows)]
        page.heading(work.table.title)
        page.table(header, rows)
        page.text(words)
        pictures = {
            row.name: torch.stack(
                [load_png(file) for file in sorted(Path(found[row.slug][0]["images_folder"]).glob("*.png"))[:GRID_IMAGES]]
            )
            for row in work.rows
            if row.slug in found
        }
        save_rows(args.output / f"{work.table.name}.png", pictures, GRID_IMAGES)
        page.picture(f"{work.table.name}.png", "One row for each setting, the same noises")
    for name, text in {
        "table.md": "\n".join(markdown),
        "table.json": json.dumps({work.table.name: found for work, found in zip(works, results, strict=True)}, indent=1),
    }.items():
        with atomic_write(args.output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with atomic_write(args.output / "table.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    page.write(args.output / "index.html")


def check(work: Work) -> bool:
    """Whether weights, checkpoints and options of each Q-Diffusion row fit together; prints a line for each row."""
    good, pictures = True, {}
    job = work.full_precision(CHECK_STEPS)
    with torch.no_grad():
        pictures[FULL] = torch.cat([job.sample(job.task.load().to(work.device), chunk) for chunk in job.chunks(GRID_IMAGES)])
        for row in work.rows:
            path = work.checkpoint(row) if row.method == QDIFF else None
            if path is None:
                if row.method == QDIFF:
                    print(f"{row.name}: no checkpoint to check ({row.file}.safetensors or .pth in --checkpoints)")
                continue
            made = prepare(work.options(CHECK_IMAGES, work.table.seed, work.folder / "unused") + work.quantization(row))
            network = work.network(made, None)
            error = work.trajectory_error(network, CHECK_IMAGES, CHECK_STEPS)
            passed = error < CHECK_LIMIT
            good &= passed
            print(f"{row.name}: {'PASS' if passed else 'FAIL'}, trajectory error {error:.4f} (limit {CHECK_LIMIT}), {path}", flush=True)
            pictures[row.name] = torch.cat([job.sample(network, chunk) for chunk in job.chunks(GRID_IMAGES)])
    save_rows(work.args.output / f"check_{work.table.name}.png", pictures, GRID_IMAGES)
    print(f"{work.args.output / f'check_{work.table.name}.png'}: {GRID_IMAGES} images of each, {CHECK_STEPS} steps")
    return good
