"""Figures that explain quantization errors: activation ranges over time, split shortcuts, errors along trajectories."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.architecture import Architecture
from qdiff.evaluation.trajectory import StepErrors
from qdiff.layers import dequantize
from qdiff.model import quant_layers
from qdiff.scale_rules import choose_qparams
from qdiff.utils.plotting import figure_of, save_figure

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
SAMPLED = 20_000  # at most this many values of an activation give its quantiles
SHOWN_LAYERS, SHOWN_STEPS, SHOWN_SHORTCUTS = 12, 12, 6


@dataclass
class Activations:
    """The inputs of a network's layers while it samples.

    Attributes:
        times: the time step of every evaluation of the network, in order of sampling.
        ranges: {layer: [quantiles (`QUANTILES`) at every evaluation]}.
        shortcuts: {split layer: (values of the first half of its input, of the second half)}, at the middle of the
            trajectory.
    """

    times: list[float] = field(default_factory=list)
    ranges: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    shortcuts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def observe(
    model: nn.Module, wrapped: nn.Module, family: Architecture, sample: Callable[[Callable], object], steps: int
) -> Activations:
    """Run the full-precision sampler and record the inputs of the layers that are to be quantized.

    Args:
        model: the full-precision network that `sample` runs.
        wrapped: the same network with quantized layers, which names the layers.
        family: its architecture.
        sample: runs the sampler with a callback (x, t, eps).
        steps: the number of evaluations that `sample` makes.
    """
    found = Activations()
    splits = family.split_points(model)

    def look(path: str, x: Tensor) -> None:
        values = x.detach().flatten().float()
        values = values[:: max(1, values.numel() // SAMPLED)].cpu()
        found.ranges[path].append([torch.quantile(values, q).item() for q in QUANTILES])
        if path in splits and len(found.times) == steps // 2:
            first, second = (half.detach().flatten().float().cpu() for half in x.tensor_split([splits[path]], dim=1))
            found.shortcuts[path] = (first, second)

    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: look(path, args[0]))
        for path in quant_layers(wrapped)
    ]
    try:
        sample(lambda x, t, eps: found.times.append(t[0].item()))
    finally:
        for handle in handles:
            handle.remove()
    return found


def plot_ranges(found: Activations, path: Path) -> None:
    """Draw box plots over the time steps for the layers whose ranges change most along the trajectory."""

    def change(layer: str) -> float:
        widths = [q[-1] - q[0] for q in found.ranges[layer]]
        return max(widths) / max(min(widths), 1e-9)

    several = [layer for layer in found.ranges if len(found.ranges[layer]) == len(found.times)]
    layers = sorted(several, key=change, reverse=True)[:SHOWN_LAYERS]
    steps = sorted({round(i * (len(found.times) - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)})
    figure, axes = figure_of(14, 3 * -(-len(layers) // 3), nrows=-(-len(layers) // 3), ncols=3, squeeze=False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        quantiles = [found.ranges[layer][step] for step in steps]
        boxes = [
            {"whislo": q[1], "q1": q[2], "med": q[3], "q3": q[4], "whishi": q[5], "fliers": [q[0], q[6]]}
            for q in quantiles
        ]
        axis.bxp(boxes, flierprops={"marker": ".", "markersize": 3})
        axis.set_xticks(range(1, len(steps) + 1), [f"{found.times[step]:.0f}" for step in steps], fontsize=7)
        axis.set_title(f"{layer} (widest / narrowest {change(layer):.1f})", fontsize=8)
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    figure.supxlabel("time step, in order of sampling; boxes: quartiles, whiskers: 1 % and 99 %, points: extremes")
    save_figure(figure, path)


@dataclass(frozen=True)
class SplitGain:
    """The mean squared error of a concatenated input when it is quantized with min-max ranges.

    Attributes:
        layer: the path of the layer.
        whole: the error with one quantizer.
        split: the error with one quantizer for each half.
    """

    layer: str
    whole: float
    split: float


def split_gains(found: Activations, n_bits: int = 8) -> list[SplitGain]:
    """What splitting gains at each shortcut, for integers of `n_bits`."""

    def squared_error(x: Tensor) -> float:
        scale, zero = choose_qparams(x, n_bits, channel_wise=False, method="max")
        return (dequantize(Q.quantize_nearest(x, scale, zero, n_bits), scale, zero) - x).square().sum().item()

    gains = []
    for layer, halves in found.shortcuts.items():
        count = sum(half.numel() for half in halves)
        gains.append(
            SplitGain(layer, squared_error(torch.cat(halves)) / count, sum(map(squared_error, halves)) / count)
        )
    return gains


def plot_shortcuts(found: Activations, path: Path) -> None:
    """Draw the distributions of both halves at shortcuts, with the errors of one quantizer and of two."""
    shown = split_gains(found)[:SHOWN_SHORTCUTS]
    figure, axes = figure_of(14, 3 * -(-len(shown) // 3), nrows=-(-len(shown) // 3), ncols=3, squeeze=False)
    for axis, gain in zip(axes.flat, shown, strict=False):
        both = torch.cat(found.shortcuts[gain.layer])
        bins = torch.linspace(both.min(), both.max(), 120).tolist()
        for half, label in zip(found.shortcuts[gain.layer], ("decoder", "skip connection"), strict=True):
            axis.hist(half[:: max(1, half.numel() // 50_000)].tolist(), bins, alpha=0.6, label=label, density=True)
        axis.set_yscale("log")
        axis.set_title(
            f"{gain.layer}\nerror at 8 bits: one quantizer {gain.whole:.2g}, split {gain.split:.2g}", fontsize=8
        )
        axis.legend(fontsize=7)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    save_figure(figure, path)


def plot_errors(eps: Mapping[str, StepErrors], x: Mapping[str, StepErrors], path: Path) -> None:
    """Draw two kinds of error over the evaluations of the network, one line for each quantized network.

    Args:
        eps: errors of eps on the full-precision trajectory, by the networks' names.
        x: errors of x_t on the networks' own trajectories.
        path: the file to write.
    """
    figure, axes = figure_of(13, 4.5, ncols=2)
    for axis, errors, title in zip(
        axes, (eps, x), ("eps on the full-precision trajectory", "x_t of its own trajectory, same noise"), strict=True
    ):
        for name, values in errors.items():
            axis.plot(values.per_step, label=name, linewidth=1.3)
        axis.set_yscale("log")
        axis.set_xlabel("evaluation of the network, in order of sampling")
        axis.set_title(f"relative error of {title}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)
