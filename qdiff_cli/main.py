"""The entry point `qdiff COMMAND ...`. It calls the same functions as the files in `scripts/`."""

import sys
from importlib import import_module

# For each command: its module in `qdiff_cli.commands`, and a description.
COMMANDS = {
    "sample-ddim": ("sample_ddim", "sample images from a pixel-space DDPM, quantized or not"),
    "sample-ldm": ("sample_ldm", "sample images from a latent diffusion model, quantized or not"),
    "txt2img": ("txt2img", "sample images from text with Stable Diffusion v1, quantized or not"),
    "calibration-set": ("make_calibration_set", "generate a calibration set from the sampling trajectory of a model"),
    "evaluate": ("evaluate", "compute FID and other figures of a set of images"),
    "compare": ("compare", "compare quantized networks with full precision"),
    "reproduce": ("reproduce", "fill a table of the paper"),
    "export": ("export", "convert a calibrated checkpoint, or export it to ONNX"),
}


def usage() -> str:
    """The help text: all commands with their descriptions."""
    lines = [f"  {name:<16} {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(["usage: qdiff COMMAND ...   (qdiff COMMAND --help lists its options)", "", *lines])


def main() -> None:
    """Run the command that the first argument names."""
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        sys.exit(f"error: qdiff {name}: expected one of {', '.join(COMMANDS)}")
    sys.argv = [f"qdiff {name}", *args]  # argparse takes the name of the program from it
    from qdiff_cli.options import run_main  # imports PyTorch, which takes a second; the list of commands does without

    run_main(import_module(f"qdiff_cli.commands.{COMMANDS[name][0]}").main)
