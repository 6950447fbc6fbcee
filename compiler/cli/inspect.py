"""keysieve inspect MODEL|DIR: which layers match, and what the cache takes."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from keysieve.compiler.cli.arguments import add_quiet, progress_of
from keysieve.compiler.cli.describe import has_rope, layer_rows, report_rows
from keysieve.compiler.cli.terminal import quiet_transformers, say, show, show_json, table

if TYPE_CHECKING:
    from keysieve.compiler.inspect import Report


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="MODEL|DIR", help="a model (no weights are read), or a bundle folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_quiet(parser)


def run(args: Namespace) -> int:
    """1 if no layer at all has a rotary embedding that matched: such a model cannot be compiled."""
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
    layers = layer_rows(report.layers)
    return "\n".join([head, *([table(layers)] if layers else []), table(report_rows(report))])
