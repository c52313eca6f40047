"""What a calibration did, as tables and pictures: loss of each unit, signal-to-noise ratio of each layer."""

import csv
import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.architecture import Architecture
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.directory import MANIFEST, read_entries
from qdiff.calibration.run import nearest_rounding
from qdiff.checkpoint.reading import first_line
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.model import quant_layers
from qdiff.utils.files import atomic_write
from qdiff.utils.plotting import figure_of, save_figure

log = logging.getLogger(__name__)

REPORT_ROWS = 32  # rows, of all time steps, that the signal-to-noise ratios come from


@torch.no_grad()
def layer_sqnr(
    model: nn.Module, networks: dict[str, nn.Module], rows: CalibrationData, device: torch.device
) -> dict[str, dict[str, float]]:
    """Signal-to-quantization-noise ratio in dB of the output of every layer, in the running network.

    10 log10(||y||^2 / ||y_q - y||^2) over REPORT_ROWS rows spread over all rows; y of `model` in full precision.

    Returns:
        {layer: {network's name: dB}}, in order of execution.
    """
    chosen = torch.linspace(0, len(rows) - 1, min(REPORT_ROWS, len(rows))).round().long()
    inputs = [part.to(device) for part in rows[chosen]]
    paths = list(quant_layers(next(iter(networks.values()))))
    outputs: dict[str, Tensor] = {}
    table: dict[str, dict[str, float]] = {}

    def run(network: nn.Module, visit: object) -> None:
        handles = [
            network.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: visit(path, y))
            for path in paths
        ]
        try:
            network(*inputs)
        finally:
            for handle in handles:
                handle.remove()

    def keep(path: str, y: Tensor) -> None:
        outputs[path], table[path] = y.clone(), {}

    run(model, keep)
    for name, network in networks.items():
        run(network, lambda path, y, name=name: table[path].update({name: _decibel(outputs[path], y)}))
    return table


def _decibel(signal: Tensor, found: Tensor) -> float:
    noise = (found - signal).double().square().sum() if signal.device.type != "mps" else (found - signal).square().sum()
    return (10 * torch.log10(signal.square().sum() / noise)).item() if noise > 0 else math.inf


def write_report(
    folder: Path,
    model: nn.Module,
    family: Architecture,
    wrapped: nn.Module,
    quant: QuantConfig,
    config: CalibrationConfig,
    rows: CalibrationData,
) -> None:
    """Write `layers.csv`, `layers.png` (SQNR of every layer, nearest rounding against this calibration) and `units.png` (losses)."""
    device = next(model.parameters()).device
    networks = {"nearest": nearest_rounding(model, family, quant, config, rows), "calibrated": wrapped}
    table = layer_sqnr(model, networks, rows, device)
    with atomic_write(folder / "layers.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", *(f"{name} SQNR dB" for name in networks)])
        writer.writerows([path, *(f"{value:.2f}" for value in values.values())] for path, values in table.items())
    _plot_layers(folder / "layers.png", table, list(networks))
    if (folder / MANIFEST).is_file() and (steps := read_entries(folder / MANIFEST)):
        _plot_units(folder / "units.png", steps)


def try_report(folder: Path, *args: object) -> None:
    """`write_report`, whose failure, whatever it is, must not cost a calibration: it goes to the log."""
    try:
        write_report(folder, *args)
    except Exception as error:
        log.warning("%s: the report could not be written (%s: %s)", folder, type(error).__name__, first_line(error))
        log.debug("", exc_info=True)


def _plot_layers(path: Path, table: dict[str, dict[str, float]], names: list[str]) -> None:
    figure, axes = figure_of(max(6, 0.17 * len(table)), 5)
    for name, marker in zip(names, "xo", strict=True):
        axes.plot([values[name] for values in table.values()], marker=marker, markersize=4, linewidth=1, label=name)
    axes.set_xticks(range(len(table)), table, rotation=90, fontsize=6)
    axes.set_ylabel("SQNR of the output, dB")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _plot_units(path: Path, steps: list[dict]) -> None:
    phases = [
        phase for phase in ("weights", "activations") if any(step["step"].startswith(f"{phase} ") for step in steps)
    ]
    figure, axes = figure_of(12, 4.5 * len(phases), nrows=len(phases), squeeze=False)
    for axis, phase in zip(axes[:, 0], phases, strict=True):
        chosen = [step for step in steps if step["step"].startswith(f"{phase} ") and "before" in step]
        axis.plot(
            [step["before"] for step in chosen],
            "x",
            label="nearest rounding" if phase == "weights" else "first step sizes",
        )
        axis.plot([step["after"] for step in chosen], "o", markersize=4, label="after reconstruction")
        for position, step in enumerate(chosen):
            losses = step["losses"]
            axis.plot(
                [position + 0.8 * i / max(1, len(losses)) for i in range(len(losses))],
                losses,
                color="gray",
                linewidth=0.6,
            )
        axis.set_xticks(range(len(chosen)), [step["step"].split(" ")[-1] for step in chosen], rotation=90, fontsize=6)
        axis.set_yscale("log")
        axis.set_ylabel(f"held-out loss, {phase}")
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path)
