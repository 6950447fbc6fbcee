"""The table of tested models: runs the matrix with the installed versions, and writes what came of it.

    python benchmarks/models.py [NAME ...] [--match-only]

Finds attention and RoPE in every model of tests/support/families.py (NAME: only in these), compiles and compares those
that match as tests/test_families.py does, and writes the outcome into compiler/models.json, where it replaces that of
the same versions of transformers and torch; then docs/models.md and the table in README.md. `make models` does this for
the newest and the oldest versions that are supported.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from keysieve.compiler.bundle import write_atomically
from keysieve.compiler.models import Outcome, Table, Versions, read_table, table_text
from support.families import COMPILED
from support.model_table import MATRIX, TABLE_FILE, documents, installed, outcome_of
from test_families import test_compiled_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="models of the matrix (default: all)")
    parser.add_argument("--match-only", action="store_true", help="compile nothing: what matches is no pass")
    parser.add_argument("--documents-only", action="store_true", help="write the documents anew, and run nothing")
    options = parser.parse_args()
    unknown = set(options.names) - set(MATRIX)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MATRIX)}")
    torch.set_num_threads(1)  # the tensors are tiny
    for name in [] if options.documents_only else options.names or MATRIX:
        outcome = tested(name, whole=not options.match_only)
        print(f"{name:20} {outcome.status:8} {outcome.reason or ''}", flush=True)
        # read anew: another environment may write at the same time
        write_atomically(TABLE_FILE, table_text(merged(saved_table(), installed(), name, outcome)))
    for file, text in documents(saved_table()).items():
        write_atomically(file, text)


def saved_table() -> Table:
    return read_table(TABLE_FILE.read_text(encoding="utf-8"))


def tested(name: str, whole: bool) -> Outcome:
    """The outcome of one model: what finding says, and whether its test agrees."""
    outcome = outcome_of(name)
    if name not in COMPILED and outcome.status == "pass":
        return replace(outcome, status="fail", reason="it matches, but tests say that it must not")
    if outcome.status == "refused":
        return outcome
    if not whole:
        return replace(outcome, status="matched")
    torch.manual_seed(0)
    np.random.seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            test_compiled_whole(name, Path(folder))
    except Exception as error:  # noqa: BLE001  (whatever it is, the table says so)
        reason = " ".join(str(error).split())[:200] or "an assertion of its test"
        return replace(outcome, status="fail", reason=f"{type(error).__name__}: {reason}")
    return outcome


def merged(table: Table, versions: Versions, name: str, outcome: Outcome) -> Table:
    """The table with this outcome, newest versions first, in the order of the matrix and without what left it."""
    table = {**table, versions: {**table.get(versions, {}), name: outcome}}

    def age(versions: Versions) -> list[tuple[int, ...]]:
        return [tuple(map(int, part.split("."))) for part in (versions.transformers, versions.torch)]

    return {
        versions: {name: table[versions][name] for name in MATRIX if name in table[versions]}
        for versions in sorted(table, key=age, reverse=True)
    }


if __name__ == "__main__":
    main()
