"""The entry point `qdiff COMMAND ...`: the same functions as the files in `scripts/`."""

import sys
from importlib import import_module

# the name of a command, its module in `qdiff_cli.commands`, and what it does
COMMANDS = {
    "sample-ddim": ("sample_ddim", "sample images from a pixel-space DDPM, quantized or not"),
    "sample-ldm": ("sample_ldm", "sample images from a latent diffusion model, quantized or not"),
    "txt2img": ("txt2img", "images from text with Stable Diffusion v1, quantized or not"),
    "calibration-set": ("make_calibration_set", "draw a calibration set from a model's own sampling trajectory"),
    "evaluate": ("evaluate", "FID and other figures of a set of images"),
    "compare": ("compare", "compare quantized networks with full precision"),
    "reproduce": ("reproduce", "fill a table of the paper"),
    "export": ("export", "convert a calibrated checkpoint, or export it to ONNX"),
}


def usage() -> str:
    lines = [f"  {name:<16} {words}" for name, (_, words) in COMMANDS.items()]
    return "\n".join(["usage: qdiff COMMAND ...   (qdiff COMMAND --help lists its options)", "", *lines])


def main() -> None:
    """Run the command named by the first word of the command line."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        sys.exit(f"error: qdiff {name}: expected one of {', '.join(COMMANDS)}")
    sys.argv = [f"qdiff {name}", *rest]  # parsers name themselves by the first word
    from qdiff_cli.options import run_main  # PyTorch takes a second, which the list of commands need not wait for

    run_main(import_module(f"qdiff_cli.commands.{COMMANDS[name][0]}").main)
