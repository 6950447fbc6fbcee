"""keysieve inspect MODEL|DIR|STATS: which layers match, and what the cache takes; or how well statistics fit."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from keysieve.compiler.cli import statistics
from keysieve.compiler.cli.arguments import add_quiet, progress_of
from keysieve.compiler.cli.describe import has_rope, layer_rows, report_rows
from keysieve.compiler.cli.terminal import UsageError, quiet_transformers, say, show, show_json, table

if TYPE_CHECKING:
    from keysieve.compiler.inspect import Report


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="MODEL|DIR|STATS",
        help="a model (no weights are read), a bundle folder, or a statistics file of keysieve calibrate",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        type=Path,
        help="of a statistics file: R of every layer and band, and shares of the heads, as .svg",
    )
    add_quiet(parser)


def run(args: Namespace) -> int:
    """1 if no layer at all has a rotary embedding that matched: such a model cannot be compiled."""
    if statistics.is_file(args.source):
        return statistics.run(args)
    if args.picture:
        raise UsageError(f"--picture needs a statistics file, and {args.source} is none")
    from keysieve.compiler.inspect import inspect

    quiet_transformers()
    report = inspect(args.source, progress=progress_of(args))
    if args.json:
        show_json(report.to_json())
    else:
        show(_text(report))
    if not has_rope(report.layers):
        say(f"error: no attention layer of {args.source} has a rotary embedding that matched; it cannot be compiled")
        return 1
    return 0


def _text(report: "Report") -> str:
    matched = sum(layer.matched for layer in report.layers)
    head = f"{report.architecture}: {matched} of {len(report.layers)} attention layers match"
    layers = layer_rows(report.layers, report.eviction["policy"]["name"] if report.nodes else "")
    return "\n".join([head, *([table(layers)] if layers else []), table(report_rows(report))])
