"""Fill a table of the paper, or that of the bundled models: calibrate or load, sample, evaluate, each row beside its published numbers."""

import argparse
from pathlib import Path

from qdiff.config import PRESETS
from qdiff.errors import ConfigError
from qdiff.evaluation.features import EXTRACTORS, default_cache
from qdiff.evaluation.images import Selected
from qdiff.evaluation.metrics import METRICS
from qdiff.utils.files import check_writable
from qdiff_cli.evaluation import open_reference
from qdiff_cli.options import Parser, add_device_options, positive, select_device, split_command
from qdiff_cli.reproduction import TableRun, check, write_tables
from qdiff_cli.running import Ranks, log_to, setup_threads
from qdiff_cli.tables import NAMED, tables


def parse(argv: list[str] | None) -> argparse.Namespace:
    own, more = split_command(argv)
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--table", required=True, choices=NAMED)
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="only these: full-precision, linear-w8a8, q-diffusion-w4a8, ..."
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these of the bundled models")
    parser.add_argument(
        "--images", type=positive, help="images of each row (default: as published; 64 for the bundled models)"
    )
    parser.add_argument("--seeds", type=positive, default=1, help="sample every row with so many seeds")
    parser.add_argument(
        "--trajectory_images", type=positive, default=16, help="images that the trajectory error is measured on"
    )
    parser.add_argument(
        "--checkpoints", type=Path, help="folder of calibrated checkpoints: w4a8.safetensors, w8a8.pth, ..."
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="recipe of calibrations (default: published; fast for the bundled models)",
    )
    parser.add_argument("--reference", help="reference images or statistics, as evaluate.py takes them")
    parser.add_argument(
        "--extractor", choices=EXTRACTORS, help="features (default: inception; lite0 for the bundled models)"
    )
    parser.add_argument(
        "--crop",
        type=positive,
        help="cut reference images to this size (default: 256 for LSUN, 512 for Stable Diffusion)",
    )
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: those of the table")
    parser.add_argument(
        "--weights", type=Path, help="the extractor's weights (default: fetched, or the installed package's)"
    )
    parser.add_argument("--captions", type=Path, help="COCO annotation file with the captions, for Stable Diffusion")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    parser.add_argument("--check", action="store_true", help="pass or fail in minutes, before the long run")
    parser.add_argument("--output", type=Path, default=Path("reproduced"))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where features are kept")
    add_device_options(parser)
    args = parser.parse_args(own)
    args.more = more
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks = Ranks.from_environment(select_device(args.device))
    setup_threads(args.threads)
    known = tables(args.table)
    unknown = sorted(set(args.models or []) - {table.name for table in known})
    if unknown:
        raise ConfigError(f"--models {' '.join(unknown)}: expected some of {', '.join(table.name for table in known)}")
    chosen = [table for table in known if not args.models or table.name in args.models]
    if args.clip and not any(table.prompts for table in chosen):
        raise ConfigError(f"--clip: the images of {args.table} have no prompts")
    if args.captions and all(table.count for table in chosen):
        raise ConfigError(f"--captions: the images of {args.table} are not made from captions")
    if args.crop and args.reference and not isinstance(open_reference(args), Selected):
        raise ConfigError("--crop: expected images as the --reference")
    if args.checkpoints and not args.checkpoints.is_dir():
        raise ConfigError(f"--checkpoints {args.checkpoints}: expected a folder")
    works = [TableRun(table, args) for table in chosen]
    for work in works:
        work.commands.check_options()
    if ranks.rank == 0:
        check_writable(args.output / "index.html")
    log_to(None, verbose=False)
    if args.check:
        verdicts = [check(work) for work in works]  # all of them, whatever the first says
        if not all(verdicts):
            raise ConfigError("the check failed: see the lines above")
        return
    for work in works:
        work.check_inputs()
    for work in works:
        if ranks.rank == 0:
            print(work.estimate(), flush=True)
        ranks.barrier()
    results: list[dict[str, list[dict]]] = []
    for work in works:
        found: dict[str, list[dict]] = {}
        results.append(found)
        for row in work.order():
            found[row.slug] = [work.figures(row, work.table.seed + i) for i in range(args.seeds)]
            if ranks.rank == 0:
                write_tables(args, works[: len(results)], results)
    if ranks.rank == 0:
        print((args.output / "table.md").read_text(encoding="utf-8"))
        print(f"{args.output / 'index.html'}")
