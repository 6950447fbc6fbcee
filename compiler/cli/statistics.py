"""keysieve inspect STATS: how well the centres of a statistics file fit their model."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from keysieve.compiler.cli.arguments import output_file
from keysieve.compiler.cli.terminal import UsageError, say, show, show_json, table

if TYPE_CHECKING:
    from keysieve.compiler.statistics_report import StatisticsReport

HEAD = ("layer", "rope", "R", "drift", "dead bands")
WIDEST = 8  # heads that are named


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
    if report.gate is not None:
        facts.append(("gates", f"r {shown(report.gate)} with what contexts held out paid to their keys, mean"))
    for index, budget in enumerate(report.share_budgets):
        facts.append((f"shares at {budget:,}", _shares(report, index)))
    middle = report.middle
    head = [*HEAD]
    if report.gate is not None:
        head.append("gate r")
    if report.share_budgets:
        head.append(f"shares at {report.share_budgets[middle]:,}")
    rows = []
    for fit in report.layers:
        row = [str(fit.layer), fit.rope, shown(fit.resultant), shown(fit.drift), str(fit.dead or "-")]
        if report.gate is not None:
            row.append(shown(fit.gate))
        if report.share_budgets:
            row.append(" ".join(f"{share:.2f}" for share in fit.shares[middle]) if fit.shares else "-")
        rows.append(tuple(row))
    first = f"{report.architecture}: statistics of {len(report.layers)} layers"
    return "\n".join([first, table(facts), "", table([tuple(head), *rows], right=(0, 2, 3, 4, 5))])


def _shares(report: "StatisticsReport", index: int) -> str:
    """ "0.64 to 3.40, texts of 4,096 tokens; widest 3.1 (3.40), 8.0 (2.90)": layer.head, and its share."""
    heads = report.widest(sum(len(fit.shares[index]) for fit in report.layers if fit.shares), index)
    named = ", ".join(f"{layer}.{head} ({share:.2f})" for layer, head, share in heads[:WIDEST])
    return f"{heads[-1][2]:.2f} to {heads[0][2]:.2f}, texts of {report.share_context:,} tokens; widest {named}"
