"""Compare quantized networks with full precision, and write a report with tables and pictures."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from qdiff.calibration.run import Calibration
from qdiff.checkpoint import PackedFile
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.select import apply_engine
from qdiff.errors import ConfigError
from qdiff.evaluation.cost import DEFINITION, Cost
from qdiff.evaluation.explain import observe, plot_errors, plot_ranges, plot_shortcuts, split_gains
from qdiff.evaluation.page import Page, markdown_table
from qdiff.evaluation.similarity import SIMILARITY_DEFINITION
from qdiff.utils.files import atomic_write, check_writable, write_text
from qdiff_cli.bundled import NAMES, folder_of, sampling_command
from qdiff_cli.comparison import (
    FULL,
    Comparison,
    closeness_cells,
    closeness_header,
    compare,
    measure_costs,
    save_image_rows,
)
from qdiff_cli.options import DeviceOptions, Parser, add_device_options, positive, split_command
from qdiff_cli.quantization import load_calibrated
from qdiff_cli.runs import log_to
from qdiff_cli.sampling_commands import parse_sampling_command
from qdiff_cli.sampling_run import SamplingCommand, SamplingRun
from qdiff_cli.widths import width_name

NEAREST_TIMESTEPS, NEAREST_SAMPLES = 20, 16  # size of the calibration set of nearest rounding
SIMILARITY = ("psnr", "ssim", "isolated", "identity", "perceptual")
HEADER = [
    *("setting", "size MB", "GMACs", "TBOPs", *closeness_header("trajectory_error"), "last x_t error"),
    *(*closeness_header(*SIMILARITY), "s/image", "MB"),
]


@dataclass(frozen=True)
class CompareOptions:
    """The options of compare.py.

    Attributes:
        command: the sampling command, in full precision.
        checkpoints: packed checkpoints of its model.
        output: the folder of the report.
        images: the number of images of each network.
        nearest: compare with nearest rounding too.
    """

    command: SamplingCommand
    checkpoints: tuple[Path, ...]
    output: Path
    images: int
    nearest: bool


def parse(argv: Sequence[str] | None) -> CompareOptions:
    """Parse the arguments of the command; None: those of this process."""
    own_args, sampling_args = split_command(argv)
    parser = Parser((__doc__ or "").splitlines()[0])
    help_text = "bundled model to compare with its checkpoints, instead of a sampling command"
    parser.add_argument("--bundled", choices=NAMES, help=help_text)
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], help="packed checkpoints of the model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--images", type=positive, default=16, help="images of each network")
    parser.add_argument("--no_nearest", action="store_true", help="do not compare with nearest rounding")
    add_device_options(parser)
    args = parser.parse_args(own_args)
    if bool(args.bundled) == bool(sampling_args):
        parser.error("expected either --bundled or a sampling command after --")
    if sampling_args and not args.checkpoints:
        parser.error("expected --checkpoints")
    device = args.make(DeviceOptions)
    if args.bundled:
        command = sampling_command(args.bundled, args.images).on(device.device, device.threads)
    else:
        command = parse_sampling_command(sampling_args, device)
    if command.quantization.ptq:
        raise ConfigError(
            "expected a sampling command in full precision (without --ptq); the quantized networks are --checkpoints"
        )
    checkpoints = args.checkpoints
    if args.bundled and not checkpoints:
        checkpoints = [folder_of(args.bundled) / f"{bits}.safetensors" for bits in ("w8a8", "w4a8")]
    return CompareOptions(command, tuple(checkpoints), args.output, args.images, nearest=not args.no_nearest)


def load_networks(run: SamplingRun, model: nn.Module, options: CompareOptions) -> dict[str, nn.Module]:
    """Load simulated networks: each checkpoint with and without quantized activations, and nearest rounding.

    Args:
        run: the sampling run.
        model: the full-precision network.
        options: the options of compare.py.

    Returns:
        The networks by their names in the report.

    Raises:
        ConfigError: a checkpoint is not packed, or two checkpoints have the same bit widths.
    """
    loaded: dict[str, tuple[QuantConfig, nn.Module]] = {}
    for path in options.checkpoints:
        packed = PackedFile.find(path)
        if packed is None:
            raise ConfigError(f"{path}: expected packed checkpoints; scripts/export.py converts published ones")
        config = packed.info.config
        for activations in (False, True) if config.quant_act else (False,):
            quant = replace(config, quant_act=activations)
            name = width_name(quant, run.task)
            if name in loaded and not activations and config.quant_act:
                continue  # another checkpoint has weights of the same width
            if name in loaded:
                raise ConfigError(f"{path}: a second checkpoint for {name}")
            loaded[name] = quant, load_calibrated(path, run.task, quant).to(run.device)
    if not options.nearest:
        return {name: network for name, (_, network) in loaded.items()}
    num_timesteps = min(NEAREST_TIMESTEPS, run.task.evaluations)
    recipe = CalibrationConfig(num_timesteps=num_timesteps, samples=NEAREST_SAMPLES)
    data = run.task.make_calibration_set(model, recipe).select(recipe.num_timesteps, recipe.samples)
    networks: dict[str, nn.Module] = {}
    for name, (quant, network) in loaded.items():
        networks[name] = network
        networks[f"{name} nearest"] = Calibration(model, run.task.architecture, quant.linear(), recipe, data).run()
    return networks


def table_rows(found: Comparison, costs: dict[str, Cost]) -> list[list[str]]:
    """The rows of the table, as text."""
    rows = []
    for name, cost in costs.items():
        cells = [name, f"{cost.size / 1e6:.2f}", f"{cost.macs / 1e9:.3f}", f"{cost.bops / 1e12:.4f}"]
        if name == FULL:
            cells += [""] * (2 + len(SIMILARITY))
        else:
            cells += [f"{found.eps[name].mean:.4f}", f"{found.x[name].per_step[-1]:.4f}"]
            cells += closeness_cells(found.similarity[name], *SIMILARITY)
        memory = found.memory[name]
        rows.append([*cells, f"{found.seconds[name]:.3f}", "" if memory is None else f"{memory / 1e6:.0f}"])
    return rows


def write_report(
    folder: Path, run: SamplingRun, model: nn.Module, quantized: nn.Module, found: Comparison, costs: dict[str, Cost]
) -> list[list[str]]:
    """Write tables (Markdown, CSV, JSON), pictures and `index.html`.

    Args:
        folder: the folder of the report.
        run: the sampling run.
        model: the full-precision network.
        quantized: the quantized network whose activations are shown.
        found: the comparison.
        costs: the cost of each network, by name.

    Returns:
        The rows of the table.
    """
    rows = table_rows(found, costs)
    write_text(folder / "table.md", f"{markdown_table(HEADER, rows)}\n\n{SIMILARITY_DEFINITION} {DEFINITION}\n")
    with atomic_write(folder / "table.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    content = {
        name: {
            "eps": found.eps[name].per_step,
            "x": found.x[name].per_step,
            **asdict(found.similarity[name]),
            **asdict(costs[name]),
        }
        for name in found.similarity
    }
    write_text(folder / "errors.json", json.dumps(content, indent=1))
    _write_page(folder, run, model, quantized, found, rows)
    return rows


def _write_page(
    folder: Path, run: SamplingRun, model: nn.Module, quantized: nn.Module, found: Comparison, rows: list[list[str]]
) -> None:
    """Write the pictures, and the page that shows them with the table."""
    save_image_rows(folder / "images.png", found.images)
    plot_errors(found.eps, found.x, folder / "errors.png")
    num_steps = len(next(iter(found.eps.values())).per_step)
    batch = range(min(4, run.batch_size))
    observed = observe(
        model,
        quantized,
        run.task.architecture,
        lambda callback: run.sample_latents(model, batch, callback),
        num_steps,
    )
    plot_ranges(observed, folder / "ranges.png")
    count = len(found.images[FULL])
    page = Page(f"{run.title}: quantized against full precision")
    page.text(f"{count} images from the same noise samples.")
    page.table(HEADER, rows)
    page.text(
        "eps error: ||e_q - e|| / ||e|| on the full-precision trajectory, mean over its steps; last x_t error: on its "
        "own trajectory. PSNR, SSIM and perceptual distance (EfficientNet-Lite0 features, not LPIPS) of the final "
        f"images against full precision. {SIMILARITY_DEFINITION} MB: peak memory while sampling "
        f"{min(run.batch_size, count)} images, above that of the loaded networks. {DEFINITION}"
    )
    page.heading("From the same noise samples")
    page.picture("images.png", "One row for each setting")
    page.heading("How errors grow along the trajectory")
    caption = "Left: every network on the full-precision x_t. Right: every network on its own trajectory."
    page.picture("errors.png", caption)
    page.heading("Activations change over the time steps")
    caption = "Inputs of the layers whose ranges change most: a calibration set must hold all time steps"
    page.picture("ranges.png", caption)
    if observed.shortcuts:
        plot_shortcuts(observed, folder / "shortcuts.png")
        page.heading("Two halves of a concatenated shortcut")
        page.picture("shortcuts.png", "Their distributions differ, so each half gets its own quantizer (split)")
        gains = [
            [gain.layer, f"{gain.whole:.3g}", f"{gain.split:.3g}", f"{gain.whole / gain.split:.2f}"]
            for gain in split_gains(observed)
        ]
        page.table(["shortcut", "one quantizer: squared error at 8 bits", "split", "ratio"], gains)
    page.write(folder / "index.html")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    run = options.command.make_run()
    check_writable(options.output / "index.html")
    log_to(None, verbose=False)
    model = run.load_full_precision()
    simulated = load_networks(run, model, options)
    costs = measure_costs(run, model, simulated)
    engine = run.options.engine
    networks = {name: apply_engine(network, engine) for name, network in simulated.items()}
    with torch.no_grad():
        found = compare(run, apply_engine(model, engine), networks, options.images)
    rows = write_report(options.output, run, model, next(iter(simulated.values())), found, costs)
    print(markdown_table(HEADER, rows), f"{SIMILARITY_DEFINITION} {DEFINITION}", sep="\n\n")
    print(f"{options.output / 'index.html'}")
