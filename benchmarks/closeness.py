"""How close packed files of a bundled model come to full precision, with quantized activations and without.

    python benchmarks/closeness.py --model emoji32 --images 64 models/ddim/emoji32/w8a8.safetensors

Each file gives two rows, A8 and A32: the trajectory error, the PSNR and the SSIM of the images, the number of isolated
wrong pixels, and the share of pictures that keep their identity (docs/evaluation.md), from the same noise samples as
full precision, beside the bytes of the file.
"""

import argparse
from pathlib import Path

import torch

from qdiff.checkpoint import load_packed
from qdiff.evaluation.page import markdown_table
from qdiff.model import enable_activations
from qdiff_cli.bundled import NAMES, sampling_command
from qdiff_cli.comparison import CLOSENESS, closeness_cells, closeness_header, compare

SHOWN = ("psnr", "ssim", "isolated", "identity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="packed checkpoints")
    parser.add_argument("--model", choices=NAMES, default=NAMES[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = sampling_command(args.model, args.images).on("cpu", args.threads).make_run()
    networks, sizes = {}, {}
    for file in args.files:
        for activations in (True, False):
            network, _ = load_packed(file)
            enable_activations(network, activations)
            name = f"{file.stem} {'A8' if activations else 'A32'}"
            networks[name], sizes[name] = network, file.stat().st_size
    found = compare(run, run.load_full_precision(), networks, args.images)
    error_format = CLOSENESS["trajectory_error"][1]
    rows = []
    for name in networks:
        error = error_format.format(found.eps[name].mean)
        rows.append([name, f"{sizes[name] / 1e6:.2f}", error, *closeness_cells(found.similarity[name], *SHOWN)])
    print(markdown_table(["file", "MB", *closeness_header("trajectory_error", *SHOWN)], rows))


if __name__ == "__main__":
    main()
