"""keysieve calibrate MODEL -o FILE: the statistics of a model's queries."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from shlex import quote

from keysieve.compiler.cli.arguments import add_quiet, output_file, positive, progress_of
from keysieve.compiler.cli.terminal import quiet_transformers, show

MAX_TOKENS = 65536


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
        help="plain UTF-8 texts (default: the topics of Python's help())",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive, default=MAX_TOKENS, help=f"tokens to read (default {MAX_TOKENS})"
    )
    add_quiet(parser)


def run(args: Namespace) -> int:
    output = output_file(args.output)
    try:
        from keysieve.compiler.calibrate import calibrate

        quiet_transformers()
        result = calibrate(args.model, output, texts=args.text, max_tokens=args.max_tokens, progress=progress_of(args))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(output)) from None
    show(f"{output}: {result.tokens:,} tokens, {len(result.layers)} layers")
    show(f"next: keysieve compile {quote(args.model)} -o DIR --stats {quote(str(output))}")
    return 0


def _interrupted(output: Path) -> str:
    if output.suffix == ".pt":
        return "interrupted; a .pt file holds finished statistics only, so nothing was kept (choose .safetensors)"
    if not output.exists():
        return "interrupted; nothing was measured yet"
    return f"interrupted; what is done was kept in {output}, and the same command goes on from there"
