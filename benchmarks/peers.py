"""Other quantization tools beside this project: error over bytes, for weights only and with quantized activations.

    pip install sdnq optimum-quanto torchao
    python benchmarks/peers.py
    python benchmarks/peers.py --models emoji32 terrain --n 64 --ours emoji32=calibration/w4a8.safetensors

Each peer quantizes the bundled models and the network of `terrain`, and samples from the same noises as full precision.
A tool that is not installed is skipped. Beside them stand packed files of this project (those of --ours, or else the
bundled ones) and, for each of --settings, what `qdiff.quantize` makes of the network now, in the format of `terrain`.
A file with quantized activations is measured with and without them.

The error is the trajectory error: the mean over the steps of the relative error of eps on the full-precision
trajectory. The PSNR is that of the images. The terrain network has both for generated and varied terrains, G / V. The
bytes are those of all tensors of the network's state, quantized or not; for ours the size of the packed file. The
seconds are CPU time. The plots go to the folder of --output, one for each model.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import terrain
import torch
from peer_tools import PEERS, Inputs, is_installed, state_bytes
from torch import nn

import qdiff
from qdiff.architecture import CUSTOM
from qdiff.checkpoint import PackedFile
from qdiff.config import CalibrationConfig
from qdiff.errors import ConfigError
from qdiff.evaluation.page import markdown_table
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.plotting import figure_of, save_figure
from qdiff_cli.bundled import NAMES, folder_of, sampling_command
from qdiff_cli.comparison import compare

TERRAIN = "terrain"
HEADER = ["network", "activations", "bytes", "error", "PSNR dB", "CPU s"]
CALIBRATION = CalibrationConfig(num_timesteps=20, samples=32)  # the calibration samples of bundled models
Scores = dict[str, tuple[float, float]]  # (error, PSNR in dB) by the name of the measure


@dataclass(frozen=True)
class Entry:
    """A quantized network.

    Attributes:
        name: as the table shows it.
        network: the network.
        activations: whether its activations are quantized.
        size: bytes.
        seconds: CPU time of its quantization; None: it was read from a file.
    """

    name: str
    network: nn.Module
    activations: bool
    size: int
    seconds: float | None


@dataclass(frozen=True)
class Subject:
    """A full-precision network and how its quantized forms are judged.

    Attributes:
        name: the name of the model.
        network: in full precision.
        samples: makes calibration samples.
        judge: the scores of networks, by their names.
    """

    name: str
    network: nn.Module
    samples: Callable[[], Inputs]
    judge: Callable[[Mapping[str, nn.Module]], dict[str, Scores]]


def quantized_by_peers(subject: Subject) -> Iterable[Entry]:
    """The networks of all installed peers. A line says which peers are missing or fail."""
    for peer in PEERS:
        if not is_installed(peer.module):
            print(f"{peer.name}: skipped, {peer.module} is not installed")
            continue
        samples = subject.samples()
        began = time.process_time()
        try:
            network = peer.quantize(copy.deepcopy(subject.network), samples).eval()
            seconds = time.process_time() - began
            network(*(part[:1] for part in samples))
        except Exception as error:  # a foreign tool may raise anything
            print(f"{peer.name}: skipped, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        yield Entry(peer.name, network, peer.activations, state_bytes(network), seconds)


def packed_files(subject: Subject, paths: Iterable[Path]) -> Iterable[Entry]:
    """The networks of packed files, without quantized activations and, if the file has them, with them."""
    for path in paths:
        packed = PackedFile.open(path)
        quant = packed.info.config
        model = subject.network if packed.info.family == CUSTOM else None
        for activations in (False, True) if quant.quant_act else (False,):
            name = f"ours W{quant.weight_bit}A{quant.act_bit if activations else 32}, {path.parent.name}/{path.stem}"
            yield Entry(name, packed.network(activations, model), activations, path.stat().st_size, None)


def quantized_now(subject: Subject, settings: Iterable[str]) -> Iterable[Entry]:
    """What `qdiff.quantize` makes of the network, for each setting."""
    for text in settings:
        arguments, samples = terrain.parse_setting(text), subject.samples()
        began = time.process_time()
        network = qdiff.quantize(subject.network, samples, **arguments)
        seconds, activations = time.process_time() - began, arguments["act_bit"] is not None
        yield Entry(f"ours {text}", network, activations, terrain.packed_bytes(network), seconds)


def bundled_subject(name: str, images: int) -> Subject:
    """A bundled model, judged by its trajectory error and its images."""
    run = sampling_command(name, images).on("cpu", 1).make_run()
    model = run.load_full_precision().requires_grad_(False)

    def judge(networks: Mapping[str, nn.Module]) -> dict[str, Scores]:
        with torch.no_grad():
            found = compare(run, model, networks, run.total)
        return {label: {"eps": (found.eps[label].mean, found.similarity[label].psnr)} for label in networks}

    @functools.cache
    def samples() -> Inputs:
        made = run.task.make_calibration_set(model, CALIBRATION)
        return made.select(CALIBRATION.num_timesteps, CALIBRATION.samples).inputs

    return Subject(name, model, samples, judge)


def terrain_subject() -> Subject:
    """The network of `terrain`, judged by generated and varied terrains."""
    network = terrain.load_network()
    reference = terrain.sample(network)

    def scores(quantized: nn.Module) -> Scores:
        found = terrain.compare(terrain.sample(quantized, reference[0]), reference)
        return {"G": (found.generated, found.generated_psnr), "V": (found.varied, found.varied_psnr)}

    def judge(networks: Mapping[str, nn.Module]) -> dict[str, Scores]:
        return {label: scores(quantized) for label, quantized in networks.items()}

    return Subject(TERRAIN, network, functools.cache(lambda: terrain.calibration_samples(network)), judge)


def plot(path: Path, title: str, entries: Sequence[Entry], scores: Mapping[str, Scores]) -> None:
    """Draw the error over bytes: a row for each measure, weights only on the left, with activations on the right."""
    measures = list(next(iter(scores.values())))
    figure, axes = figure_of(13, 5 * len(measures), nrows=len(measures), ncols=2, squeeze=False)
    for row, measure in zip(axes, measures, strict=True):
        for axis, activations in zip(row, (False, True), strict=True):
            for entry in (entry for entry in entries if entry.activations is activations):
                point = entry.size / 1e6, scores[entry.name][measure][0]
                axis.plot(*point, "oC0" if entry.name.startswith("ours") else "xC1")
                axis.annotate(entry.name, point, (4, 3), textcoords="offset points", fontsize=7)
            axis.set(xlabel="MB", ylabel=f"error of {measure}", yscale="log")
            axis.margins(x=0.3, y=0.1)
            axis.set_title(f"{title}: {'with activations' if activations else 'weights only'}", fontsize=9)
            axis.grid(alpha=0.3)
    save_figure(figure, path)


def table(entries: Iterable[Entry], scores: Mapping[str, Scores]) -> str:
    """The table of a model in Markdown."""
    rows = []
    for entry in entries:
        errors, decibels = zip(*scores[entry.name].values(), strict=True)
        cells = [" / ".join(f"{value:.4f}" for value in errors), " / ".join(f"{value:.1f}" for value in decibels)]
        seconds = "" if entry.seconds is None else f"{entry.seconds:.1f}"
        rows.append([entry.name, "yes" if entry.activations else "no", f"{entry.size:,}", *cells, seconds])
    return markdown_table(HEADER, rows)


def parse_file(text: str) -> tuple[str, Path]:
    """(model, path) of MODEL=PATH."""
    name, _, path = text.partition("=")
    if name not in (*NAMES, TERRAIN) or not path:
        raise argparse.ArgumentTypeError(f"{text}: expected MODEL=PATH with one of {', '.join((*NAMES, TERRAIN))}")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*NAMES, TERRAIN], default=[*NAMES, TERRAIN])
    parser.add_argument("--n", type=int, default=8, help="images of each bundled model")
    parser.add_argument("--ours", nargs="+", type=parse_file, default=[], metavar="MODEL=PATH", help="packed files")
    parser.add_argument("--settings", nargs="+", default=[], help="settings to quantize now, as for terrain.py")
    parser.add_argument("--output", type=Path, default=Path("peers"), help="folder of the plots")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_torchvision_importable()  # optimum-quanto imports it
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        try:
            subject = terrain_subject() if name == TERRAIN else bundled_subject(name, args.n)
        except ConfigError as error:
            print(f"{name}: skipped, {error}")
            continue
        paths = [path for model, path in args.ours if model == name]
        if not args.ours and name != TERRAIN:
            paths = [folder_of(name) / f"{widths}.safetensors" for widths in ("w8a8", "w4a8")]
        entries = [*quantized_by_peers(subject), *packed_files(subject, paths), *quantized_now(subject, args.settings)]
        if not entries:
            print(f"{name}: skipped, no peer is installed and there is nothing of ours")
            continue
        scores = subject.judge({entry.name: entry.network for entry in entries})
        print(f"\n{name}\n\n{table(entries, scores)}", flush=True)
        plot(args.output / f"{name}.png", name, entries, scores)


if __name__ == "__main__":
    main()
