"""Fill a table of the paper, or the table of the bundled models: calibrate, sample and evaluate each row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdiff.config import PRESETS
from qdiff.engines.select import INTEGER_ENGINES
from qdiff.errors import ConfigError
from qdiff.evaluation.features import EXTRACTORS, default_cache
from qdiff.evaluation.images import Selected
from qdiff.evaluation.metrics import METRICS
from qdiff.utils import distributed
from qdiff.utils.files import check_writable
from qdiff_cli.evaluation import EvaluationConfig, open_reference
from qdiff_cli.options import (
    DeviceOptions,
    ParsedArgs,
    Parser,
    add_device_options,
    positive,
    split_command,
)
from qdiff_cli.quantization_options import RULES, QuantizationOptions
from qdiff_cli.reproduction import ReproductionConfig, TableCheck, TableRun, write_tables
from qdiff_cli.runs import log_to
from qdiff_cli.table_commands import TableCommands, TableOptions
from qdiff_cli.tables import FULL, TABLES, PaperTable

# Options that are refused after `--`, because the table sets them, and what to use instead.
BY_ROWS = "choose the rows by --rows, and files by --checkpoints"
SET_BY_TABLE = dict.fromkeys(
    ("ptq", "quant_act", "weight_bit", "act_bit", "quant_mode", "cali_ckpt", "resume_w"), BY_ROWS
) | {
    "max_images": "use --images",
    "n_samples": "use --images",
    "logdir": "use --output",
    "outdir": "use --output",
    "from_file": "the table has its own prompts",
    "continue_run": "a table is always continued",
}
ALWAYS_ACCEPTED = {"cond", "resume"}  # without an effect


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of reproduce.py.

    Attributes:
        table: a name of `TABLES`.
        commands: the commands of each table.
        config: how the tables are filled.
        check: check the weights, checkpoints and options instead.
    """

    table: str
    commands: tuple[TableCommands, ...]
    config: ReproductionConfig
    check: bool


def make_parser() -> Parser:
    """The parser of the command's options."""
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--table", required=True, choices=list(TABLES), help="table to fill")
    help_text = "rows, such as full-precision linear-w8a8 q-diffusion-w4a8 (default: all)"
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=help_text)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="bundled models of the table (default: all)")
    help_text = "images of each row (default: the published number; 64 for the bundled models)"
    parser.add_argument("--images", type=positive, help=help_text)
    parser.add_argument("--seeds", type=positive, default=1, help="number of seeds for every row")
    help_text = "number of images for the trajectory error"
    parser.add_argument("--trajectory_images", type=positive, default=16, help=help_text)
    help_text = "folder of calibrated checkpoints, such as w4a8.safetensors and w8a8.pth"
    parser.add_argument("--checkpoints", type=Path, help=help_text)
    help_text = "recipe of calibrations (default: published; fast for the bundled models)"
    parser.add_argument("--preset", choices=list(PRESETS), help=help_text)
    parser.add_argument("--reference", help="reference images, or saved statistics of them, as for evaluate.py")
    help_text = "network for the features (default: inception; lite0 for the bundled models)"
    parser.add_argument("--extractor", choices=EXTRACTORS, help=help_text)
    help_text = "cut reference images to this size, in pixels (default: 256 for LSUN, 512 for Stable Diffusion)"
    parser.add_argument("--crop", type=positive, help=help_text)
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="metrics (default: the metrics of the table)")
    help_text = "weights of the extractor (default: downloaded, or from an installed package)"
    parser.add_argument("--weights", type=Path, help=help_text)
    parser.add_argument("--captions", type=Path, help="annotation file of COCO with captions, for Stable Diffusion")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    parser.add_argument("--check", action="store_true", help="check the inputs in minutes, before a long run")
    parser.add_argument("--output", type=Path, default=Path("reproduced"), help="output folder")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of cached features")
    add_device_options(parser)
    return parser


def parse(argv: Sequence[str] | None) -> ReproduceOptions:
    """Parse and check the arguments of the command; None: those of this process."""
    own_args, sampling_args = split_command(argv)
    args = make_parser().parse_args(own_args)
    tables, device = _chosen_tables(args), args.make(DeviceOptions)
    evaluation = EvaluationConfig(
        reference=args.reference,
        metrics=args.metrics,
        weights=args.weights,
        crop=args.crop,
        clip=args.clip,
        cache=args.cache,
        device=args.device,
    )
    if args.crop and args.reference and not isinstance(open_reference(evaluation), Selected):
        raise ConfigError("--crop: expected images as the --reference")
    if args.checkpoints and not args.checkpoints.is_dir():
        raise ConfigError(f"--checkpoints {args.checkpoints}: expected a folder")
    rows = None if args.rows is None else tuple(args.rows)
    options = TableOptions(args.output, args.images, rows, args.checkpoints, args.captions)
    commands = tuple(_commands(table, options, args.preset, device, sampling_args) for table in tables)
    config = ReproductionConfig(args.output, args.seeds, args.trajectory_images, evaluation, args.extractor, device)
    return ReproduceOptions(args.table, commands, config, args.check)


def _chosen_tables(args: ParsedArgs) -> list[PaperTable]:
    """The tables that the options select. ConfigError for an option without an effect on any of them."""
    known = TABLES[args.table]()
    if unknown := sorted(set(args.models or []) - {table.name for table in known}):
        raise ConfigError(f"--models {' '.join(unknown)}: expected some of {', '.join(table.name for table in known)}")
    chosen = [table for table in known if not args.models or table.name in args.models]
    if args.clip and not any(table.prompts for table in chosen):
        raise ConfigError(f"--clip: the images of {args.table} have no prompts")
    if args.captions and not any(table.captions for table in chosen):
        raise ConfigError(f"--captions: the images of {args.table} are not made from captions")
    return chosen


def _commands(
    table: PaperTable, options: TableOptions, preset: str | None, device: DeviceOptions, sampling_args: Sequence[str]
) -> TableCommands:
    """The commands of a table, with the value of --preset and the options after `--`.

    Args:
        table: the table.
        options: the options of reproduce.py.
        preset: the value of --preset, if it is given.
        device: the device of the networks.
        sampling_args: the options after `--`.

    Raises:
        ConfigError: an option after `--` is one that the rows set, or has no effect on any row.
    """
    command = table.command.on(device.device, device.threads)
    if preset is not None:
        command = replace(command, quantization=replace(command.quantization, preset=preset))
    command, given = command.changed(sampling_args)
    if set_by_table := sorted(SET_BY_TABLE.keys() & given):
        name = set_by_table[0]
        raise ConfigError(f"--{name.replace('_run', '')}: belongs to the rows of the table; {SET_BY_TABLE[name]}")
    commands = TableCommands(replace(table, command=command), options, given)
    _validate_effect(commands, given | ({"preset"} if preset else set()))
    return commands


def _validate_effect(commands: TableCommands, given: frozenset[str] | set[str]) -> None:
    """Raise ConfigError for a quantization option without an effect on any row of the table.

    An engine of integers must be possible for every row, because it is an error where it is not.
    """
    command = commands.table.command
    names = {name for name in given if name in QuantizationOptions.__dataclass_fields__}
    typed = {name: getattr(command.quantization, name) for name in names}
    rows = [row for row in commands.rows if row.method != FULL]
    effective: set[str] = set()
    reasons: dict[str, str] = {}
    for row in rows:
        values: dict[str, Any] = vars(commands.quantization(row)) | {"cali_ckpt": commands.given_checkpoint(row)}
        args = ParsedArgs(**values | typed, typed=frozenset(names))
        without_effect = {name: rule.when for name, rule in args.without_effect(RULES)}
        effective, reasons = effective | (names - without_effect.keys()), reasons | without_effect
    if ineffective := sorted(names - effective - ALWAYS_ACCEPTED):
        raise ConfigError(
            f"--{ineffective[0]}: has no effect on any of the {len(rows)} quantized rows of the table "
            f"{commands.table.name}: it acts only {reasons[ineffective[0]]}"
        )
    without_integers = [row.slug for row in commands.rows if row.act_bit == 32]
    engine = command.run.engine
    if engine in INTEGER_ENGINES and without_integers:
        raise ConfigError(
            f"--engine {engine}: {', '.join(without_integers)} of the table {commands.table.name} have no quantized "
            "activations; choose other rows by --rows"
        )


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(argv)
    config = options.config
    device = config.device.apply()
    distributed.connect(device)
    if distributed.rank() == 0:
        check_writable(config.output / "index.html")
    log_to(None, verbose=False)
    runs = [TableRun(commands, config, device) for commands in options.commands]
    if options.check:
        verdicts = [TableCheck(run).passes() for run in runs]  # a list, so that all tables are checked
        if not all(verdicts):
            raise ConfigError("the check failed: see the lines above")
        return
    for run in runs:
        run.validate_inputs()
    for run in runs:
        if distributed.rank() == 0:
            print(run.estimate(), flush=True)
        distributed.barrier()
    results: list[dict[str, list[dict[str, Any]]]] = []
    for run in runs:
        of_table: dict[str, list[dict[str, Any]]] = {}
        results.append(of_table)
        for row in run.ordered_rows():
            of_table[row.slug] = [run.figures(row, run.table.command.seed + i) for i in range(config.seeds)]
            if distributed.rank() == 0:
                write_tables(options.table, config, runs[: len(results)], results)
    if distributed.rank() == 0:
        print((config.output / "table.md").read_text(encoding="utf-8"))
        print(f"{config.output / 'index.html'}")
