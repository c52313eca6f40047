"""Evaluate images: FID, Inception score, KID, precision and recall, CLIP score, similarity to full precision."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdiff.errors import ConfigError
from qdiff.evaluation.images import open_images
from qdiff.evaluation.similarity import SIMILARITY_DEFINITION
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
        evaluation: how the images are evaluated.
        source: the images; None: `command` samples them.
        command: the sampling command for the images; None: they are at `source`.
        device: the device of the networks.
    """

    evaluation: EvaluationConfig
    source: str | None
    command: SamplingCommand | None
    device: DeviceOptions


def parse(argv: Sequence[str] | None) -> EvaluateOptions:
    """Parse the arguments of the command; None: those of this process."""
    own_args, sampling_args = split_command(argv)
    parser = evaluation_parser((__doc__ or "").splitlines()[0])
    args = parser.parse_args(own_args)
    if bool(args.images) == bool(sampling_args):
        parser.error("expected either images or a sampling command after --")
    if args.prompts and not args.clip:
        parser.error("--prompts: expected --clip with it")
    command = parse_sampling_command(sampling_args) if sampling_args else None
    if getattr(command, "skip_save", False):
        raise ConfigError("--skip_save: no images would be left to evaluate")
    return EvaluateOptions(args.make(EvaluationConfig), args.images, command, args.make(DeviceOptions))


def format_figures(figures: Mapping[str, Any]) -> str:
    """The figures as lines of text, with the note at the end."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float) and name != "count"}
    lines = [f"{'images':12} {figures['count']}", *(f"{name:12} {value:.6g}" for name, value in numbers.items())]
    explained = [SIMILARITY_DEFINITION] if "isolated" in figures else []
    return "\n".join([*lines, figures["note"], *explained])


def sample(options: EvaluateOptions) -> str | Path:
    """Sample the images if there is a sampling command. Returns where the images are."""
    if options.command is None:
        return options.source or ""
    run = options.command.make_run()
    if not run.options.continue_run:  # a continued run may have more images than this command samples
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
    options.device.apply()  # the sampling command has set its own number of threads
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
    print(format_figures(figures))
