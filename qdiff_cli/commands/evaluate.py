"""Evaluate images: FID, Inception score, KID, precision and recall, CLIP score, likeness to full precision."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdiff.errors import ConfigError
from qdiff.evaluation.images import open_images
from qdiff.utils import distributed
from qdiff.utils.files import write_text
from qdiff_cli.evaluation import (
    EvaluationConfig,
    evaluate,
    evaluation_parser,
    validate_count,
    validate_inputs,
    validate_metrics,
)
from qdiff_cli.images import save_npz
from qdiff_cli.options import DeviceOptions, split_command
from qdiff_cli.runs import log_to
from qdiff_cli.sampling_commands import parse_sampling_command
from qdiff_cli.sampling_run import SamplingCommand


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of evaluate.py.

    Attributes:
        evaluation: what is evaluated and how.
        source: the images; None: those of `command`.
        command: the sampling command that makes the images; None: they are at `source`.
        device: where the command works.
    """

    evaluation: EvaluationConfig
    source: str | None
    command: SamplingCommand | None
    device: DeviceOptions


def parse(argv: Sequence[str] | None) -> EvaluateOptions:
    """The options of these words."""
    own, words = split_command(argv)
    parser = evaluation_parser((__doc__ or "").splitlines()[0])
    args = parser.parse_args(own)
    if bool(args.images) == bool(words):
        parser.error("expected either images or a sampling command after --")
    if args.prompts and not args.clip:
        parser.error("--prompts: expected --clip with it")
    command = parse_sampling_command(words) if words else None
    if getattr(command, "skip_save", False):
        raise ConfigError("--skip_save: no images would be left to evaluate")
    return EvaluateOptions(args.make(EvaluationConfig), args.images, command, args.make(DeviceOptions))


def show(figures: Mapping[str, Any]) -> str:
    """The figures as lines of text, with the note at the end."""
    lines = [f"{'images':12} {figures['count']}"]
    lines += [f"{name:12} {value:.6g}" for name, value in figures.items() if isinstance(value, float)]
    return "\n".join([*lines, figures["note"]])


def sample(options: EvaluateOptions) -> str | Path:
    """Where the images are, once they are sampled."""
    if options.command is None:
        return options.source or ""
    run = options.command.make_run()
    if not run.options.continue_run:  # which may find more images than are asked for
        validate_count(options.evaluation, run.total)
    return run.execute()


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    config = options.evaluation
    distributed.connect(options.device.apply())
    validate_metrics(config)
    validate_inputs(config)
    source = sample(options)
    log_to(None, verbose=False)
    options.device.apply()  # the sampling command had threads of its own
    files = getattr(open_images(source), "files", None)
    if config.npz and files is None:
        raise ConfigError(f"--npz: {source} is not a folder of images")
    figures = evaluate(config, source)
    if distributed.rank():
        return
    if config.npz and files is not None:
        save_npz(config.npz, files[: config.count])
    if config.output:
        write_text(config.output, json.dumps(figures, indent=1))
    print(show(figures))
