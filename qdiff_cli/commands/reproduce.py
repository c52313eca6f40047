"""Fill a table of the paper, or that of the bundled models: calibrate, sample and evaluate each row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdiff.config import PRESETS
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
from qdiff_cli.reproduction import Check, ReproductionConfig, TableRun, write_tables
from qdiff_cli.runs import log_to
from qdiff_cli.table_commands import TableCommands, TableOptions
from qdiff_cli.tables import FULL, TABLES, PaperTable

# Options after `--` that the rows decide on, and options that are always accepted.
OF_ROWS = {"ptq", "quant_act", "weight_bit", "act_bit", "quant_mode", "cali_ckpt", "resume_w"}
ALWAYS = {"cond", "resume"}


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of reproduce.py.

    Attributes:
        table: a name of `TABLES`.
        commands: the commands of each table.
        config: how the tables are filled.
        check: pass or fail in minutes instead.
    """

    table: str
    commands: tuple[TableCommands, ...]
    config: ReproductionConfig
    check: bool


def make_parser() -> Parser:
    """The parser of the command's options."""
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--table", required=True, choices=list(TABLES))
    words = "only these: full-precision, linear-w8a8, q-diffusion-w4a8, ..."
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=words)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these of the bundled models")
    words = "images of each row (default: as published; 64 for the bundled models)"
    parser.add_argument("--images", type=positive, help=words)
    parser.add_argument("--seeds", type=positive, default=1, help="sample every row with this number of seeds")
    words = "images that the trajectory error is measured on"
    parser.add_argument("--trajectory_images", type=positive, default=16, help=words)
    words = "folder of calibrated checkpoints: w4a8.safetensors, w8a8.pth, ..."
    parser.add_argument("--checkpoints", type=Path, help=words)
    words = "recipe of calibrations (default: published; fast for the bundled models)"
    parser.add_argument("--preset", choices=list(PRESETS), help=words)
    parser.add_argument("--reference", help="reference images or statistics, as evaluate.py takes them")
    words = "features (default: inception; lite0 for the bundled models)"
    parser.add_argument("--extractor", choices=EXTRACTORS, help=words)
    words = "cut reference images to this size (default: 256 for LSUN, 512 for Stable Diffusion)"
    parser.add_argument("--crop", type=positive, help=words)
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: those of the table")
    words = "the extractor's weights (default: fetched, or the installed package's)"
    parser.add_argument("--weights", type=Path, help=words)
    words = "COCO annotation file with the captions, for Stable Diffusion"
    parser.add_argument("--captions", type=Path, help=words)
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    parser.add_argument("--check", action="store_true", help="pass or fail in minutes, before the long run")
    parser.add_argument("--output", type=Path, default=Path("reproduced"))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where features are kept")
    add_device_options(parser)
    return parser


def parse(argv: Sequence[str] | None) -> ReproduceOptions:
    """The options of these words, checked."""
    own, words = split_command(argv)
    args = make_parser().parse_args(own)
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
    commands = tuple(_commands(table, options, args.preset, device, words) for table in tables)
    config = ReproductionConfig(args.output, args.seeds, args.trajectory_images, evaluation, args.extractor, device)
    return ReproduceOptions(args.table, commands, config, args.check)


def _chosen_tables(args: ParsedArgs) -> list[PaperTable]:
    """The tables asked for; ConfigError for options that none of them heeds."""
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
    table: PaperTable, options: TableOptions, preset: str | None, device: DeviceOptions, words: Sequence[str]
) -> TableCommands:
    """The commands of a table, with --preset and the options after `--`."""
    command = table.command.on(device.device, device.threads)
    if preset is not None:
        command = replace(command, quantization=replace(command.quantization, preset=preset))
    command, given = command.changed(words)
    if taken := sorted(OF_ROWS & given):
        raise ConfigError(
            f"--{taken[0]}: belongs to the rows of the table; choose them by --rows, and files by --checkpoints"
        )
    commands = TableCommands(replace(table, command=command), options, given)
    _validate_heeded(commands, given | ({"preset"} if preset else set()))
    return commands


def _validate_heeded(commands: TableCommands, given: frozenset[str] | set[str]) -> None:
    """Raise ConfigError for a quantization option that no row of the table heeds."""
    wanted = {name for name in given if name in QuantizationOptions.__dataclass_fields__}
    rows = [row for row in commands.rows if row.method != FULL]
    heeded: set[str] = set()
    for row in rows:
        values: dict[str, Any] = vars(commands.quantization(row)) | {"cali_ckpt": commands.given_checkpoint(row)}
        args = ParsedArgs(**values, typed=frozenset(wanted))
        heeded |= wanted - {name for name, _ in args.without_effect(RULES)}
    if silent := sorted(wanted - heeded - ALWAYS):
        raise ConfigError(
            f"--{silent[0]}: no row of the table {commands.table.name} heeds it ({len(rows)} quantized rows)"
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
        verdicts = [Check(run).passes() for run in runs]  # all of them, whatever the first says
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
        found: dict[str, list[dict[str, Any]]] = {}
        results.append(found)
        for row in run.order():
            found[row.slug] = [run.figures(row, run.table.command.seed + i) for i in range(config.seeds)]
            if distributed.rank() == 0:
                write_tables(options.table, config, runs[: len(results)], results)
    if distributed.rank() == 0:
        print((config.output / "table.md").read_text(encoding="utf-8"))
        print(f"{config.output / 'index.html'}")
