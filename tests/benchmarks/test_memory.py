"""benchmarks/memory.py on made-up rows, and docs/memory.md as it makes it of benchmarks/results/memory.json."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from memory import BEGIN, DOCUMENT, END, RESULT, merged, saved_rows, tables, unmeasured

from keysieve.compiler.memory.tasks import TASKS

OPTIONS = Namespace(model=Path("models/Tiny"), tokens=1024, trials=40, seed=0, budgets=[256, 512])


def row(contestant: str, task: str, budget: int, kept: int, **changed: Any) -> dict[str, Any]:
    counted = {"tokens": 1024, "trials": 40, "dense": 20, "kept": kept, "seed": 0}
    return {"model": "Tiny", "contestant": contestant, "task": task, "budget": budget, **counted, **changed}


def test_a_new_row_replaces_the_old_one() -> None:
    old = [row("sieve", "facts", 512, 9), row("sieve", "facts", 256, 7), row("random", "chat", 256, 3)]
    new = [row("sieve", "facts", 256, 8, trials=80), row("random", "facts", 256, 1)]
    assert merged(old, new) == [new[1], new[0], old[0], old[2]]


def test_what_is_there_with_the_same_options_is_not_measured_again() -> None:
    rows = [row("sieve", "facts", 256, 9), row("sieve", "facts", 512, 9, trials=2), row("random", "facts", 512, 9)]
    assert unmeasured(rows, "sieve", "facts", OPTIONS) == [512]
    assert unmeasured(rows, "sieve", "chat", OPTIONS) == [256, 512]
    assert unmeasured(rows, "random", "facts", OPTIONS) == [256]


def test_a_table_a_task_and_one_of_all() -> None:
    rows = merged([], [row(name, task, 256, 9) for name in ("random", "sieve") for task in ("chat", "facts")])
    rows = merged(rows, [row("sieve", "facts", 512, 12)])
    assert tables(rows).strip().splitlines() == [
        "## Tiny, prompts of 1,024 tokens",
        "",
        "40 trials a task. Cells: kept of dense.",
        "",
        "### facts",
        "",
        "|  | budget 256 | budget 512 |",
        "| --- | --- | --- |",
        "| random | 9 of 20 |  |",
        "| sieve | 9 of 20 | 12 of 20 |",
        "",
        "### chat",
        "",
        "|  | budget 256 |",
        "| --- | --- |",
        "| random | 9 of 20 |",
        "| sieve | 9 of 20 |",
        "",
        "### All of these",
        "",
        "|  | budget 256 |",
        "| --- | --- |",
        "| random | 18 of 40 |",
        "| sieve | 18 of 40 |",
    ]


def test_the_document_names_all_tasks() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in TASKS if f"\n| {name} | " not in text] == []
    assert text.count(BEGIN) == text.count(END) == 1


@pytest.mark.skipif(not RESULT.is_file(), reason="nothing was measured yet")
def test_the_document_is_made_of_the_results() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == tables(saved_rows())
