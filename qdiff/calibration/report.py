"""What a calibration did, as tables and pictures: the loss of each unit and the signal-to-noise ratio of each layer."""

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.data import CalibrationData
from qdiff.calibration.directory import MANIFEST, read_records
from qdiff.model import quant_layers
from qdiff.utils.files import atomic_write
from qdiff.utils.plotting import figure_of, save_figure

log = logging.getLogger(__name__)

REPORT_SAMPLES = 32  # samples, of all time steps, that the signal-to-noise ratios come from


@torch.no_grad()
def layer_sqnr(
    model: nn.Module, networks: Mapping[str, nn.Module], data: CalibrationData
) -> dict[str, dict[str, float]]:
    """Signal-to-quantization-noise ratio in dB of the output of every layer, in the running network.

    10 log10(||y||^2 / ||y_q - y||^2) over REPORT_SAMPLES samples spread over all samples.

    Args:
        model: the full-precision network, which gives y.
        networks: quantized networks by name, which give y_q.
        data: the samples.

    Returns:
        {layer: {network's name: dB}}, in order of execution.
    """
    device = next(model.parameters()).device
    chosen = torch.linspace(0, len(data) - 1, min(REPORT_SAMPLES, len(data))).round().long()
    paths = list(quant_layers(next(iter(networks.values()))))
    outputs: dict[str, list[Tensor]] = {}  # of every call of a layer

    def run(network: nn.Module, visit: Callable[[str, Tensor], None]) -> None:
        handles = []
        for path in paths:
            hook = partial(lambda path, _module, _inputs, output: visit(path, output), path)
            handles.append(network.get_submodule(path).register_forward_hook(hook))
        try:
            data.run(network, chosen, device)
        finally:
            for handle in handles:
                handle.remove()

    run(model, lambda path, y: outputs.setdefault(path, []).append(y.clone()))
    table: dict[str, dict[str, float]] = {path: {} for path in outputs}
    for name, network in networks.items():
        found: dict[str, list[Tensor]] = {path: [] for path in outputs}
        run(network, partial(_add_error, outputs, found))
        for path, parts in found.items():
            table[path][name] = _decibel(*torch.stack(parts).sum(0).tolist())
    return table


def _decibel(noise: float, signal: float) -> float:
    if not noise > 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _add_error(
    outputs: Mapping[str, Sequence[Tensor]], found: Mapping[str, list[Tensor]], path: str, y: Tensor
) -> None:
    """Add the sums of squares of the error and of the output of one call of the layer at `path`."""
    signal, dtype = outputs[path][len(found[path])], torch.float32 if y.device.type == "mps" else torch.float64
    found[path].append(torch.stack([part.to(dtype).square().sum() for part in (y - signal, signal)]))


def write_report(folder: Path, model: nn.Module, networks: Mapping[str, nn.Module], data: CalibrationData) -> None:
    """Write tables and pictures of a calibration into `folder`.

    `layers.csv` and `layers.png` have the SQNR of every layer, `units.png` the validation losses of every unit.

    Args:
        folder: the folder of the calibration.
        model: the full-precision network.
        networks: two quantized networks by name, nearest rounding and the calibrated one.
        data: the samples.
    """
    table = layer_sqnr(model, networks, data)
    with atomic_write(folder / "layers.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", *(f"{name} SQNR dB" for name in networks)])
        writer.writerows([path, *(f"{value:.2f}" for value in values.values())] for path, values in table.items())
    _plot_layers(folder / "layers.png", table, list(networks))
    if (folder / MANIFEST).is_file() and (records := read_records(folder / MANIFEST)):
        _plot_units(folder / "units.png", records)


def _plot_layers(path: Path, table: dict[str, dict[str, float]], names: list[str]) -> None:
    figure, axes = figure_of(max(6, 0.17 * len(table)), 5)
    for name, marker in zip(names, "xo", strict=True):
        axes.plot([values[name] for values in table.values()], marker=marker, markersize=4, linewidth=1, label=name)
    axes.set_xticks(range(len(table)), table, rotation=90, fontsize=6)
    axes.set_ylabel("SQNR of the output, dB")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _plot_units(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    phases = [
        phase
        for phase in ("weights", "activations")
        if any(record["step"].startswith(f"{phase} ") for record in records)
    ]
    figure, axes = figure_of(12, 4.5 * len(phases), nrows=len(phases), squeeze=False)
    for axis, phase in zip(axes[:, 0], phases, strict=True):
        chosen = [record for record in records if record["step"].startswith(f"{phase} ") and "before" in record]
        axis.plot(
            [record["before"] for record in chosen],
            "x",
            label="nearest rounding" if phase == "weights" else "first scales",
        )
        axis.plot([record["after"] for record in chosen], "o", markersize=4, label="after reconstruction")
        for position, record in enumerate(chosen):
            losses = record["losses"]
            axis.plot(
                [position + 0.8 * i / max(1, len(losses)) for i in range(len(losses))],
                losses,
                color="gray",
                linewidth=0.6,
            )
        axis.set_xticks(
            range(len(chosen)), [record["step"].split(" ")[-1] for record in chosen], rotation=90, fontsize=6
        )
        axis.set_yscale("log")
        axis.set_ylabel(f"validation loss, {phase}")
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path)
