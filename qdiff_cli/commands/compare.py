"""Compare quantized networks with full precision, and explain: a folder with tables, pictures and an `index.html`."""

import argparse
import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from qdiff.calibration.run import nearest_rounding
from qdiff.checkpoint import is_packed, read_packed_info
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.select import apply_engine
from qdiff.errors import ConfigError
from qdiff.evaluation.cost import DEFINITION, Cost
from qdiff.evaluation.explain import observe, plot_errors, plot_ranges, plot_shortcuts, split_gains
from qdiff.evaluation.page import Page, markdown_table
from qdiff.utils.files import atomic_write, check_writable, write_text
from qdiff_cli.bundled import NAMES, folder_of, sampling_command
from qdiff_cli.comparison import FULL, Comparison, compare, costs, save_rows
from qdiff_cli.options import Parser, add_device_options, positive, split_command
from qdiff_cli.quantization import load_calibrated
from qdiff_cli.running import log_to
from qdiff_cli.sampling_run import SamplingRun, prepare

NEAREST_STEPS, NEAREST_SAMPLES = 20, 16  # of the baseline's ranges
HEADER = [
    "setting",
    "size MB",
    "GMACs",
    "TBOPs",
    "eps error",
    "last x_t error",
    "PSNR dB",
    "SSIM",
    "perceptual (lite0)",
    "s/image",
    "MB",
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    own, command = split_command(argv)
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--bundled", choices=NAMES, help="a bundled model with its checkpoints, instead of a sampling command"
    )
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], help="packed checkpoints of the model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--images", type=positive, default=16)
    parser.add_argument("--no_nearest", action="store_true", help="leave nearest rounding out")
    add_device_options(parser)
    args = parser.parse_args(own)
    if bool(args.bundled) == bool(command):
        parser.error("expected either --bundled or a sampling command after --")
    if command and not args.checkpoints:
        parser.error("expected --checkpoints")
    args.command = command or sampling_command(args.bundled, args.images)
    args.checkpoints = args.checkpoints or [
        folder_of(args.bundled) / f"{kind}.safetensors" for kind in ("w8a8", "w4a8")
    ]
    return args


def label(quant: QuantConfig, activations: bool) -> str:
    return f"W{quant.weight_bit}A{quant.act_bit if activations else 32}"


def load_networks(job: SamplingRun, model: nn.Module, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Simulated networks by label, the widest first."""
    loaded: dict[str, tuple[QuantConfig, nn.Module]] = {}
    for path in args.checkpoints:
        if not is_packed(path):
            raise ConfigError(f"{path}: expected packed checkpoints; scripts/export.py converts published ones")
        config = read_packed_info(path).config
        for activations in (False, True) if config.quant_act else (False,):
            name = label(config, activations)
            if name in loaded and not activations and config.quant_act:
                continue  # the same weights widths with other activations: once is enough
            if name in loaded:
                raise ConfigError(f"{path}: a second checkpoint for {name}")
            quant = replace(config, quant_act=activations)
            loaded[name] = quant, load_calibrated(str(path), job.task, quant)[0].to(job.device)
    if args.no_nearest:
        return {name: network for name, (_, network) in loaded.items()}
    recipe = CalibrationConfig(steps=min(NEAREST_STEPS, job.task.evaluations), samples=NEAREST_SAMPLES)
    rows = job.task.generate(model, recipe).select(recipe.steps, recipe.samples)
    networks: dict[str, nn.Module] = {}
    for name, (quant, network) in loaded.items():
        networks[name] = network
        networks[f"{name} nearest"] = nearest_rounding(model, job.task.family, quant, recipe, rows)
    return networks


def table_of(found: Comparison, cost: dict[str, Cost]) -> list[list[str]]:
    rows = []
    for name, one in cost.items():
        cells = [name, f"{one.size / 1e6:.2f}", f"{one.macs / 1e9:.3f}", f"{one.bops / 1e12:.4f}"]
        if name == FULL:
            cells += [""] * 5
        else:
            close = found.similarity[name]
            cells += [f"{found.eps[name].mean:.4f}", f"{found.x[name].per_step[-1]:.4f}"]
            cells += [f"{close.psnr:.1f}", f"{close.ssim:.3f}", f"{close.perceptual:.3f}"]
        memory = found.memory[name]
        rows.append([*cells, f"{found.seconds[name]:.3f}", "" if memory is None else f"{memory / 1e6:.0f}"])
    return rows


def write_report(
    folder: Path, job: SamplingRun, model: nn.Module, wrapped: nn.Module, found: Comparison, cost: dict[str, Cost]
) -> list[list[str]]:
    """Tables (Markdown, CSV, JSON), pictures and `index.html`; the rows of the table."""
    rows = table_of(found, cost)
    write_text(folder / "table.md", f"{markdown_table(HEADER, rows)}\n\n{DEFINITION}\n")
    with atomic_write(folder / "table.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    content = {
        name: {
            "eps": found.eps[name].per_step,
            "x": found.x[name].per_step,
            **asdict(found.similarity[name]),
            **asdict(cost[name]),
        }
        for name in found.similarity
    }
    write_text(folder / "errors.json", json.dumps(content, indent=1))
    save_rows(folder / "images.png", found.images)
    plot_errors(found.eps, found.x, folder / "errors.png")
    steps = len(next(iter(found.eps.values())).per_step)
    looked = observe(
        model,
        wrapped,
        job.task.family,
        lambda callback: job.draw(model, range(min(4, job.batch_size)), callback),
        steps,
    )
    plot_ranges(looked, folder / "ranges.png")

    page = Page(f"{job.title}: quantized against full precision")
    page.text(f"{len(found.images[FULL])} images from the same noises.")
    page.table(HEADER, rows)
    page.text(
        "eps error: ||e_q - e|| / ||e|| on the full-precision trajectory, mean over its steps; last x_t error: on its own trajectory. "
        "PSNR, SSIM and perceptual distance (EfficientNet-Lite0 features, not LPIPS) of the final images against full precision. "
        f"MB: peak memory while sampling {min(job.batch_size, len(found.images[FULL]))} images, above that of the loaded networks. "
        + DEFINITION
    )
    page.heading("The same noises")
    page.picture("images.png", "One row for each setting")
    page.heading("How errors grow along the trajectory")
    page.picture(
        "errors.png", "Left: every network on the full-precision x_t. Right: every network on its own trajectory."
    )
    page.heading("Activations change over the time steps")
    page.picture(
        "ranges.png", "Inputs of the layers whose ranges change most: a calibration set must hold all time steps"
    )
    if looked.shortcuts:
        plot_shortcuts(looked, folder / "shortcuts.png")
        page.heading("Two halves of a concatenated shortcut")
        page.picture("shortcuts.png", "Their distributions differ, so each half gets its own quantizer (split)")
        gains = [
            [gain.layer, f"{gain.whole:.3g}", f"{gain.split:.3g}", f"{gain.whole / gain.split:.2f}"]
            for gain in split_gains(looked)
        ]
        page.table(["shortcut", "one quantizer: squared error at 8 bits", "split", "ratio"], gains)
    page.write(folder / "index.html")
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    script, *options = args.command
    job = prepare([script, "--device", args.device, "--threads", str(args.threads), *options])
    if job.args.ptq:
        raise ConfigError(
            "expected a sampling command in full precision (without --ptq); the quantized networks are --checkpoints"
        )
    check_writable(args.output / "index.html")
    log_to(None, verbose=False)
    model = job.task.load().to(job.device).eval()
    simulated = load_networks(job, model, args)
    cost = costs(job, simulated)
    networks = {name: apply_engine(network, job.args.engine) for name, network in simulated.items()}
    with torch.no_grad():
        found = compare(job, apply_engine(model, job.args.engine), networks, args.images)
    rows = write_report(args.output, job, model, next(iter(simulated.values())), found, cost)
    print(markdown_table(HEADER, rows), DEFINITION, sep="\n\n")
    print(f"{args.output / 'index.html'}")
