"""keysieve compare DIR --text FILE...: what eviction costs, against the same engine without it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keysieve.compiler.cli.arguments import (
    ENGINE,
    add_report_options,
    given,
    output_file,
    positive,
    positive_list,
    progress_of,
)
from keysieve.compiler.cli.terminal import quiet_transformers, show_report, table

BUDGETS = [256, 512, 1024]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="DIR", type=Path, help="a bundle folder of `keysieve compile`")
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        help="plain UTF-8 texts, each longer than the largest budget",
    )
    parser.add_argument(
        "--budgets",
        metavar="N,...",
        type=positive_list,
        default=BUDGETS,
        help=f"rows kept (default {','.join(map(str, BUDGETS))})",
    )
    parser.add_argument("--max-tokens", metavar="N", type=positive, help="tokens to read of each text (default 2048)")
    add_report_options(parser)


def run(args: Namespace) -> int:
    output = args.output and output_file(args.output)
    from keysieve.compiler.compare import compare

    quiet_transformers()
    more = given(args, "max_tokens", *ENGINE)
    report = compare(args.bundle, args.text, args.budgets, progress=progress_of(args), **more)
    show_report(report, _text(report["rows"]), args.json, output)
    return 0


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("policy", "heads", "scope", "budget", "tokens", "KL", "KL p95", "top-1", "ppl", "ppl dense")
    body = [
        (
            row["policy"],
            row["heads"],
            row["scope"],
            str(row["budget"]),
            f"{row['tokens']:,}",
            f"{row['kl']:.4f}",
            f"{row['kl_p95']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['ppl']:.3f}",
            f"{row['ppl_dense']:.3f}",
        )
        for row in rows
    ]
    return table([head, *body], right=range(3, len(head)))
