"""keysieve remember DIR: what an engine still knows after eviction, beside its own run without it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keysieve.compiler.cli.arguments import (
    ENGINE,
    add_report_options,
    given,
    natural,
    output_file,
    positive,
    positive_list,
    progress_of,
)
from keysieve.compiler.cli.terminal import quiet_transformers, show_report, table, usage_errors
from keysieve.compiler.memory.tasks import TASKS, check_tasks


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="DIR", type=Path, help="a bundle folder of `keysieve compile`")
    parser.add_argument(
        "--tasks",
        metavar="TASK,...",
        type=lambda text: list(dict.fromkeys(text.split(","))),
        help=f"what is asked (default {','.join(TASKS)})",
    )
    parser.add_argument("--budgets", metavar="N,...", type=positive_list, help="rows kept (default 256,512)")
    parser.add_argument("--tokens", metavar="N", type=positive, help="tokens of each prompt (default 1024)")
    parser.add_argument("--trials", metavar="N", type=positive, help="prompts a task (default 20)")
    parser.add_argument("--seed", metavar="N", type=natural, help="of the prompts (default 0)")
    add_report_options(parser)


def run(args: Namespace) -> int:
    output = args.output and output_file(args.output)
    with usage_errors():
        check_tasks(args.tasks or list(TASKS))
    from keysieve.compiler.memory import remember

    quiet_transformers()
    more = given(args, "tasks", "budgets", "tokens", "trials", "seed", *ENGINE)
    report = remember(args.bundle, progress=progress_of(args), **more)
    show_report(report, _text(report["rows"]), args.json, output)
    return 0


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("task", "tokens", "budget", "policy", "dense", "kept")
    body = [
        (
            row["task"],
            f"{row['tokens']:,}",
            str(row["budget"]),
            row["policy"],
            f"{row['dense']} of {row['trials']}",
            f"{row['kept']} of {row['dense']}",
        )
        for row in rows
    ]
    return table([head, *body], right=(1, 2, 4, 5))
