"""keysieve inspect STATS: how well the centres of a statistics file fit their model."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from keysieve.compiler.cli.arguments import output_file
from keysieve.compiler.cli.terminal import UsageError, say, show, show_json, table

if TYPE_CHECKING:
    from keysieve.compiler.statistics_report import StatisticsReport

HEAD = ("layer", "rope", "R", "drift", "dead bands")


def is_file(source: str) -> bool:
    """Whether `inspect` was given a statistics file: the only file that it takes besides a .gguf model."""
    return Path(source).is_file() and not source.endswith(".gguf")


def run(args: Namespace) -> int:
    """Print the report, as a table or JSON, and write the picture if there is to be one."""
    from keysieve.compiler.statistics_report import statistics_report, write_report

    if args.picture:
        output_file(args.picture, "--picture")
        if args.picture.suffix != ".svg":
            raise UsageError(f"--picture {args.picture}: a picture is .svg")
    report = statistics_report(args.source)
    if args.picture:
        write_report(report, args.picture)
    if args.json:
        show_json(report.to_json())
    else:
        show(_text(report))
    if report.doubt:
        say(f"warning: {report.doubt}")
    return 0


def _text(report: "StatisticsReport") -> str:
    from keysieve.compiler.statistics_report import shown

    planned = f" of {report.tokens_planned:,} planned" if report.tokens < report.tokens_planned else ""
    halves = " and ".join(f"{tokens:,}" for tokens in report.tokens_by_half)
    facts = [
        ("tokens", f"{report.tokens:,}{planned}"),
        ("R", f"{shown(report.resultant)}, the mean resultant length, weighted by amplitude"),
        ("drift", f"{shown(report.drift)} between halves of {halves} tokens" if halves else "unknown"),
    ]
    rows = [
        (str(fit.layer), fit.rope, shown(fit.resultant), shown(fit.drift), str(fit.dead or "-"))
        for fit in report.layers
    ]
    head = f"{report.architecture}: statistics of {len(report.layers)} layers"
    return "\n".join([head, table(facts), "", table([HEAD, *rows], right=(0, 2, 3, 4))])
