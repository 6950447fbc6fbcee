"""keysieve calibrate MODEL -o FILE: the statistics of a model's queries."""

import warnings
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from keysieve.compiler.cli.arguments import add_quiet, output_file, positive, progress_of
from keysieve.compiler.cli.terminal import UsageError, quiet_transformers, say, show, usage_errors
from keysieve.compiler.config import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from keysieve.compiler.statistics_report import StatisticsReport


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a hub name, a folder with config.json, or a .gguf file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="the statistics file; one that an interrupted run left is continued (.pt: the TriAttention format)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        help="texts: .jsonl or .parquet with one text a row, else plain UTF-8 (default: the topics of Python's help())",
    )
    parser.add_argument(
        "--text-field", metavar="NAME", default="text", help="field of .jsonl, column of .parquet (default text)"
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=positive,
        default=CALIBRATION_TOKENS,
        help=f"tokens to read (default {CALIBRATION_TOKENS})",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=positive, default=1, help="sequences of one forward pass (default 1)"
    )
    parser.add_argument(
        "--layer-by-layer",
        action=BooleanOptionalAction,
        default=None,
        help="read the weights one layer at a time, for models larger than memory (default: where they do not fit)",
    )
    parser.add_argument(
        "--gates",
        action=BooleanOptionalAction,
        default=None,
        help="learn gates and the heads' shares of the budget, too, for sieve (default: unless FILE is a .pt)",
    )
    parser.add_argument(
        "--context",
        metavar="N",
        type=positive,
        help="tokens of the texts for shares, as long as those to be served (default 4096, or what fits)",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="write how well centres fit the model: .svg (a picture) or .json",
    )
    add_quiet(parser)


def run(args: Namespace) -> int:
    output = output_file(args.output)
    if args.context is not None and args.gates is False:
        raise UsageError("--context is for the texts by which shares are learned; leave --no-gates or --context out")
    if args.gates and output.suffix == ".pt":
        raise UsageError("a .pt file has no place for gates and shares; leave --gates out, or name another file")
    if args.context is not None and output.suffix == ".pt":
        raise UsageError("a .pt file has no place for shares; leave --context out, or name another file")
    if args.report:
        _check_report(args.report)
    try:
        from keysieve.compiler.calibrate import calibrate
        from keysieve.compiler.statistics_report import statistics_report, write_report
        from keysieve.compiler.workers import process_group

        quiet_transformers()
        with process_group() as first:
            if not first:
                warnings.simplefilter("ignore")  # one of the processes says them
            result = calibrate(
                args.model,
                output,
                texts=args.text,
                max_tokens=args.max_tokens,
                progress=progress_of(args),
                text_field=args.text_field,
                batch_size=args.batch_size,
                layer_by_layer=args.layer_by_layer,
                gates=args.gates is not False,
                context=args.context,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(output)) from None
    if not first:
        return 0
    report = statistics_report(result)
    if args.report:
        write_report(report, args.report)
    if report.resultant is not None and not args.quiet:
        _say_summary(report)
    show(f"{output}: {result.tokens:,} tokens, {len(result.layers)} layers")
    show(f"next: keysieve compile {quote(args.model)} -o DIR --stats {quote(str(output))}")
    return 0


def _check_report(path: Path) -> None:
    from keysieve.compiler.statistics_report import check_format

    output_file(path, "--report")
    with usage_errors():
        check_format(path)


def _say_summary(report: "StatisticsReport") -> None:
    from keysieve.compiler.statistics_report import shown

    drift = f", drift {shown(report.drift)} between the halves of the text" if report.tokens_by_half else ""
    weakest = ", ".join(f"{layer.layer} ({shown(layer.resultant)})" for layer in report.weakest(3))
    say(f"amplitude-weighted R {shown(report.resultant)}{drift}; weakest layers {weakest or 'none'}")


def _interrupted(output: Path) -> str:
    if output.suffix == ".pt":
        return "interrupted; a .pt file holds finished statistics only, so nothing was kept (choose .safetensors)"
    if not output.exists():
        return "interrupted; nothing was measured yet"
    return f"interrupted; what is done was kept in {output}, and the same command goes on from there"
