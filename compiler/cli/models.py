"""keysieve models: the architectures that were tested, and what came of it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keysieve.compiler.cli.terminal import show, show_json, table

if TYPE_CHECKING:
    from keysieve.compiler.models import TestedModel

OTHERS = """\
Versions in brackets: every layer matches, but the model was not compiled with them.
Models that are not listed are tried like these: `keysieve inspect MODEL` says which layers match."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    from keysieve.compiler.models import models

    tested = models()
    if args.json:
        # what was only matched is no verdict yet
        show_json({"models": [model.to_json() for model in tested if model.outcome.status != "matched"]})
    else:
        show(_text(tested))
    return 0


def _text(tested: Sequence["TestedModel"]) -> str:
    rows = [("architecture", "status", "attention", "RoPE", "evicts", "transformers", "torch")]
    reasons = []
    for model in tested:
        found = model.outcome
        evicts = f"{found.evicts} of {found.layers} layers" if found.status in ("pass", "matched") else "-"
        rows.append(
            (
                found.architecture,
                found.status,
                found.attention or "-",
                found.rope_form or "-",
                evicts,
                model.tested_with("transformers"),
                model.tested_with("torch"),
            )
        )
        if found.reason:
            reasons.append((found.architecture, found.status, found.reason))
    return "\n\n".join([table(rows), *([table(reasons)] if reasons else []), OTHERS])
