"""Evaluate images: FID, Inception score, KID, precision and recall, CLIP score, and likeness to full-precision images."""

import argparse
import json
from pathlib import Path

from qdiff.errors import ConfigError
from qdiff.evaluation.images import open_images
from qdiff.utils.files import write_text
from qdiff_cli.evaluation import (
    check_count,
    check_inputs,
    check_wishes,
    evaluate,
    evaluation_parser,
)
from qdiff_cli.images import save_npz
from qdiff_cli.options import select_device, split_command
from qdiff_cli.running import Ranks, log_to, setup_threads
from qdiff_cli.sampling_run import prepare, run


def parse(argv: list[str] | None) -> argparse.Namespace:
    own, command = split_command(argv)
    parser = evaluation_parser(__doc__.splitlines()[0])
    args = parser.parse_args(own)
    if bool(args.images) == bool(command):
        parser.error("expected either images or a sampling command after --")
    if args.prompts and not args.clip:
        parser.error("--prompts: expected --clip with it")
    args.command = command
    return args


def show(figures: dict, note: str) -> str:
    lines = [f"{'images':12} {figures['count']}"]
    lines += [f"{name:12} {value:.6g}" for name, value in figures.items() if isinstance(value, float)]
    return "\n".join([*lines, note])


def sample(args: argparse.Namespace) -> Path:
    """The folder of the images that the sampling command makes."""
    job = prepare(args.command)
    if not job.args.continue_run:  # which may find more images than are asked for
        check_count(args, job.total)
    if getattr(job.args, "skip_save", False):
        raise ConfigError("--skip_save: no images would be left to evaluate")
    return run(job)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks = Ranks.from_environment(select_device(args.device))
    setup_threads(args.threads)
    check_wishes(args)
    check_inputs(args)
    source = sample(args) if args.command else args.images
    log_to(None, verbose=False)
    setup_threads(args.threads)  # the command had its own
    files = getattr(open_images(source), "files", None)
    if args.npz and files is None:
        raise ConfigError(f"--npz: {source} is not a folder of images")
    figures = evaluate(args, source)
    if ranks.rank:
        return
    if args.npz:
        save_npz(args.npz, files[: args.count])
    if args.output:
        write_text(args.output, json.dumps(figures, indent=1))
    print(show(figures, figures["note"]))
