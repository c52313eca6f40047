"""How good a calibration is, in the log, as tables and as pictures: the network's output, each layer and each unit."""

import csv
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qdiff.attention import with_called_matmuls
from qdiff.calibration.batches import in_batches, relative_errors
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.directory import MANIFEST, read_records
from qdiff.calibration.effects import squared_effects
from qdiff.calibration.ranges import RANGE_SAMPLES
from qdiff.layers import QuantLayer, QuantMatMul
from qdiff.model import act_quantizers, enable_activations, find_timestep_groups, quant_layers
from qdiff.utils.files import atomic_write
from qdiff.utils.plotting import figure_of, save_figure

log = logging.getLogger(__name__)

REPORT_SAMPLES = 32  # samples, of all time steps, that the signal-to-noise ratios come from
ERROR_SAMPLES = 128  # samples of the validation split that the errors of the output come from, at most
ERROR_BATCH = 16  # samples of one pass for these errors
EFFECT_SAMPLES = 8  # samples of the validation split that the effects of layers come from, at most
EFFECT_VECTORS = 4  # random directions of the output for each of them
EFFECT_PASSES = 2 + 2 * EFFECT_VECTORS  # that this costs: both networks forward, and twice as long backward
MAX_ERROR = 0.3  # a larger relative error of the output leaves little of the images
WORST_LAYERS = 5  # that the log names
NEAREST, CALIBRATED = "nearest", "calibrated"
WEIGHTS, ACTIVATIONS = "weights only", "with activations"

Errors = dict[str, dict[str, float]]  # of the output, by the network's name and by WEIGHTS or ACTIVATIONS


@dataclass(frozen=True)
class Quality:
    """How good a quantized network is.

    Attributes:
        errors: from `output_errors`, of nearest rounding and of the calibrated network if there is one.
        effects: from `layer_effects`.
        samples: the number of samples that the errors come from.
    """

    errors: Errors
    effects: dict[str, float]
    samples: int


def _spread(indices: range, count: int) -> Tensor:
    """At most `count` of the indices, spread evenly over all."""
    return torch.linspace(indices.start, indices.stop - 1, min(count, len(indices))).round().long()


def _modes(network: nn.Module) -> list[str]:
    """How a quantized network can be used."""
    has_activations = any(quantizer.enabled for quantizer in act_quantizers(network).values())
    return [WEIGHTS, ACTIVATIONS] if has_activations else [WEIGHTS]


@contextmanager
def _mode(network: nn.Module, mode: str) -> Iterator[None]:
    """Inside the `with`, `network` runs in one of its modes."""
    if mode == ACTIVATIONS or ACTIVATIONS not in _modes(network):
        yield
        return
    enable_activations(network, False)
    try:
        yield
    finally:
        enable_activations(network, True)


@torch.no_grad()
def output_errors(
    model: nn.Module,
    networks: Mapping[str, nn.Module],
    data: CalibrationData,
    on_samples: Callable[[int], object] = lambda _: None,
) -> Errors:
    """Relative errors of the network's output, with quantized weights only and with quantized activations.

    ||y_q - y|| / ||y|| of each sample, averaged over at most ERROR_SAMPLES samples of the validation split.

    Args:
        model: the full-precision network, which gives y.
        networks: quantized networks by name, which give y_q.
        data: the samples, with their splits.
        on_samples: called after every batch with the number of its samples, times the number of passes.

    Returns:
        {network's name: {mode: error}}. The mode WEIGHTS always, and ACTIVATIONS if these are quantized.
    """
    device = next(model.parameters()).device
    modes = {name: _modes(network) for name, network in networks.items()}
    chosen = _spread(data.validation, ERROR_SAMPLES)
    sums: Errors = {name: dict.fromkeys(of_network, 0.0) for name, of_network in modes.items()}

    def add(part: slice) -> None:
        target = data.run(model, chosen[part], device)
        found: list[tuple[str, str, float]] = []
        for name, network in networks.items():
            for mode in modes[name]:
                with _mode(network, mode):
                    output = data.run(network, chosen[part], device)
                found.append((name, mode, relative_errors(output, target).sum().item()))
        for name, mode, total in found:  # all or nothing, because a part that does not fit is repeated
            sums[name][mode] += total
        on_samples(len(target) * (1 + len(found)))

    in_batches(add, range(len(chosen)), ERROR_BATCH)
    return {
        name: {mode: total / len(chosen) for mode, total in of_network.items()} for name, of_network in sums.items()
    }


def layer_effects(
    model: nn.Module,
    network: nn.Module,
    data: CalibrationData,
    on_sample: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Estimate the relative error of the network's output that each quantized layer alone causes.

    A quantized layer, fed with its full-precision input, changes its output by d, and the output of the network by J d
    (`qdiff.calibration.effects`). This costs EFFECT_PASSES passes of the network over at most EFFECT_SAMPLES samples of
    the validation split, whatever the number of layers.

    Args:
        model: the full-precision network.
        network: the quantized network, in the mode that is judged.
        data: the samples, with their splits.
        on_sample: is called after every sample.

    Returns:
        {layer or attention matmul: ||J d|| / ||y||}, the root of the mean square over the samples, in order of
        execution. It is empty if no layer leaves a gradient in the network.
    """
    device = next(model.parameters()).device
    modules = {path: module for path, module in network.named_modules() if isinstance(module, QuantLayer | QuantMatMul)}
    groups, reference = find_timestep_groups(network), with_called_matmuls(model, network)

    def change(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> list[Tensor]:
        return [modules[path](*args, **kwargs) - output]

    def run(index: Tensor) -> Tensor:
        if groups is not None:
            groups.set(data.timesteps(index))
        return data.run(reference, index, device)

    chosen = _spread(data.validation, EFFECT_SAMPLES)
    squares = squared_effects(reference, list(modules), change, run, chosen, EFFECT_VECTORS, on_sample)
    return {path: math.sqrt(square) for path, (square,) in squares.items()}


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
    chosen = _spread(range(len(data)), REPORT_SAMPLES)
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


def report_quality(
    folder: Path | None,
    model: nn.Module,
    quantized: nn.Module,
    nearest: Callable[[], nn.Module] | None,
    data: CalibrationData,
) -> None:
    """Log how good a quantized network is, and write tables and pictures about it into `folder`.

    The log gets the errors of the output, the layers with the largest effects, and a warning if the network is worse
    than nearest rounding or its error is over MAX_ERROR. `network.csv` has the errors, `layers.csv` the effect and the
    SQNR of every layer, `layers.png` the SQNR, and `units.png` the validation losses of every unit.

    Args:
        folder: the folder of the calibration; None: there is only the log.
        model: the full-precision network.
        quantized: the quantized network.
        nearest: makes the same network by nearest rounding; None: `quantized` is that network.
        data: the samples, with their splits.
    """
    count, effects_count = min(len(data.validation), ERROR_SAMPLES), min(len(data.validation), EFFECT_SAMPLES)
    others = 0 if nearest is None else 1
    passes = 1 + len(_modes(quantized)) * (1 + others)
    total = EFFECT_PASSES * effects_count + others * min(RANGE_SAMPLES, len(data)) + passes * count
    total += 0 if folder is None else (2 + others) * min(REPORT_SAMPLES, len(data))
    with logging_redirect_tqdm(), tqdm(total=total, desc="report", unit="sample") as progress:
        effects = layer_effects(model, quantized, data, lambda: progress.update(EFFECT_PASSES))
        networks = {CALIBRATED: quantized}
        if nearest is None:
            networks = {NEAREST: quantized}
        else:
            networks = {NEAREST: nearest(), CALIBRATED: quantized}
            progress.update(min(RANGE_SAMPLES, len(data)))
        quality = Quality(output_errors(model, networks, data, progress.update), effects, count)
        log_quality(quality, find_timestep_groups(quantized) is not None)
        if folder is not None:
            write_report(folder, model, networks, data, quality)
            progress.update(total - progress.n)


def log_quality(quality: Quality, grouped: bool) -> None:
    """Log the errors and the worst layers, with warnings.

    Args:
        quality: what was measured.
        grouped: whether the network has timestep groups.
    """
    errors, effects = quality.errors, quality.effects
    described = "; ".join(
        f"{name} " + ", ".join(f"{error:.4g} {mode}" for mode, error in of_network.items())
        for name, of_network in errors.items()
    )
    log.info("relative error of the output on %d validation samples: %s", quality.samples, described)
    worst = sorted(effects, key=lambda path: effects[path], reverse=True)[:WORST_LAYERS]
    if worst:
        named = ", ".join(f"{path} {effects[path]:.2g}" for path in worst)
        log.info("layers with the largest effect on it, each alone (estimated): %s", named)
    judged = errors.get(CALIBRATED, errors[NEAREST])
    for mode, error in judged.items():
        if error > errors[NEAREST][mode]:
            message = "worse than nearest rounding, %s: relative error of the output %.4g, by nearest rounding %.4g"
            log.warning(message, mode, error, errors[NEAREST][mode])
        if not error <= MAX_ERROR:  # also if it is not a number
            hint = (
                "; timestep_groups gives ranges to groups of time steps" if mode == ACTIVATIONS and not grouped else ""
            )
            log.warning("relative error of the output %.4g, %s: expected at most %s%s", error, mode, MAX_ERROR, hint)


def write_report(
    folder: Path,
    model: nn.Module,
    networks: Mapping[str, nn.Module],
    data: CalibrationData,
    quality: Quality,
) -> None:
    """Write the tables and pictures of a calibration, see `report_quality`.

    Args:
        folder: the folder of the calibration.
        model: the full-precision network.
        networks: nearest rounding, and the calibrated network if there is one.
        data: the samples.
        quality: what the log says too.
    """
    modes = list(next(iter(quality.errors.values())))
    rows = [[name, *(f"{errors[mode]:.6g}" for mode in modes)] for name, errors in quality.errors.items()]
    _write_csv(folder / "network.csv", ["network", *(f"error of the output, {mode}" for mode in modes)], rows)
    table = layer_sqnr(model, networks, data)
    header = ["layer", "effect on the output", *(f"{name} SQNR dB" for name in networks)]
    lines = []
    for path, effect in quality.effects.items():
        found = [f"{value:.2f}" for value in table[path].values()] if path in table else [""] * len(networks)
        lines.append([path, f"{effect:.3g}", *found])
    _write_csv(folder / "layers.csv", header, lines)
    _plot_layers(folder / "layers.png", table, list(networks))
    if (folder / MANIFEST).is_file() and (records := read_records(folder / MANIFEST)):
        _plot_units(folder / "units.png", records)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _plot_layers(path: Path, table: dict[str, dict[str, float]], names: list[str]) -> None:
    figure, axes = figure_of(max(6, 0.17 * len(table)), 5)
    for name, marker in zip(names, "xo", strict=False):
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
