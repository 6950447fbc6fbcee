"""What every policy still knows after eviction, of what the dense engine answers right (see docs/memory.md).

    python benchmarks/memory.py [--model DIR] [--stats FILE] [--only NAME,...] [--budgets 256,512] [--trials 40]

Every contestant is compiled into build/memory/ and asked the same questions. Rows go into
benchmarks/results/memory.json as they come: what is there with as many trials is skipped, unless --fresh asks for all
of it again. Then the tables of docs/memory.md are written from that file.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keysieve.compiler.bundle import write_atomically
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.memory import remember
from keysieve.compiler.memory.tasks import TASKS
from keysieve.compiler.progress import Progress

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "build" / "model" / "SmolLM2-135M-Instruct"
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
DOCUMENT = ROOT / "docs" / "memory.md"
WORK = ROOT / "build" / "memory"
BEGIN = "<!-- begin: written by benchmarks/memory.py -->\n"
END = "<!-- end -->"
IDENTITY = ("model", "contestant", "task", "tokens", "budget")

Row = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """One policy. learned: it needs statistics with gates and shares."""

    name: str
    policy: PolicyConfig
    heads: str | None = None
    learned: bool = False


CONTESTANTS = [
    Contestant("streaming", PolicyConfig("streaming")),
    Contestant("key-norm", PolicyConfig("key-norm")),
    Contestant("random", PolicyConfig("random")),
    Contestant("triattention online", PolicyConfig("triattention", "online")),
    Contestant("triattention online, head classes", PolicyConfig("triattention", "online"), "classes", learned=True),
    Contestant("sieve", PolicyConfig("sieve"), learned=True),
]
NAMES = [contestant.name for contestant in CONTESTANTS]


def main() -> None:
    options = parse()
    rows = saved_rows()
    dense: dict[str, list[bool]] = {}
    for contestant in CONTESTANTS:
        if contestant.name not in options.only:
            continue
        done = [] if options.fresh else rows
        missing = {task: left for task in options.tasks if (left := unmeasured(done, contestant.name, task, options))}
        if not missing:
            continue
        engine = load(compiled(contestant, options), options.threads)
        print(f"== {contestant.name}", flush=True)
        for task, budgets in missing.items():
            report = remember(engine, [task], budgets, options.tokens, options.trials, options.seed, dense=dense)
            named = {"model": options.model.name, "contestant": contestant.name, "seed": options.seed}
            rows = merged(rows, [named | row for row in report["rows"]])
            write_atomically(RESULT, json.dumps({"rows": rows}, indent=1) + "\n")
    if rows:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
        write_atomically(DOCUMENT, before + BEGIN + tables(rows) + END + rest.split(END, 1)[1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--stats", type=Path, help="statistics with gates (default: calibrated into build/memory)")
    parser.add_argument("--only", default=";".join(NAMES), help="contestants, separated by semicolons")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--budgets", default="256,512")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fresh", action="store_true", help="measure anew what the results have, too")
    options = parser.parse_args()
    options.only, options.tasks = options.only.split(";"), options.tasks.split(",")
    options.budgets = [int(budget) for budget in options.budgets.split(",")]
    for name, known in [*((name, NAMES) for name in options.only), *((name, list(TASKS)) for name in options.tasks)]:
        if name not in known:
            parser.error(f"unknown {name!r}; choose among {'; '.join(known)}")
    return options


def compiled(contestant: Contestant, options: argparse.Namespace) -> Path:
    """A bundle of that contestant, made anew."""
    WORK.mkdir(parents=True, exist_ok=True)
    stats = None
    if contestant.learned:
        stats = options.stats or WORK / "stats.safetensors"
        if options.stats is None:
            calibrate(options.model, stats, max_tokens=32768, gates=True)
    folder = WORK / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    eviction = EvictionConfig(contestant.policy, budget=min(options.budgets), heads=contestant.heads)
    compile(options.model, folder, CompileConfig(eviction, stats=stats), Progress(quiet=True))
    return folder


# -- results -----------------------------------------------------------------------------------------------------


def saved_rows() -> list[Row]:
    return json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else []


def unmeasured(rows: Iterable[Row], contestant: str, task: str, options: argparse.Namespace) -> list[int]:
    """The budgets at which that contestant has no row for the task with these options."""
    wanted = (options.model.name, contestant, task, options.tokens, options.trials, options.seed)
    names = ("model", "contestant", "task", "tokens", "trials", "seed")
    done = {row["budget"] for row in rows if tuple(row[name] for name in names) == wanted}
    return [budget for budget in options.budgets if budget not in done]


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Rows of both, sorted; a new one replaces the old one that differs in trials or seed alone, or not at all."""
    rows = {tuple(row[name] for name in IDENTITY): row for row in [*old, *new]}
    order = (NAMES, list(TASKS))

    def place(row: Row) -> tuple[Any, ...]:
        return (
            row["model"],
            row["tokens"],
            order[1].index(row["task"]),
            order[0].index(row["contestant"]),
            row["budget"],
        )

    return sorted(rows.values(), key=place)


# -- the document ------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> str:
    """Markdown: for each model and length a table of all tasks together, and one a task."""
    parts = []
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        group = [row for row in rows if (row["model"], row["tokens"]) == (model, tokens)]
        counts = sorted({row["trials"] for row in group})
        trials = " or ".join(map(str, counts))
        parts.append(f"\n## {model}, prompts of {tokens:,} tokens\n\n{trials} trials a task. Cells: kept of dense.\n")
        tasks = list(dict.fromkeys(row["task"] for row in group))
        parts += [f"\n### {task}\n\n" + table([row for row in group if row["task"] == task]) for task in tasks]
        if len(tasks) > 1:
            parts.append("\n### All of these\n\n" + table(summed(group, len(tasks))))
    return "".join(parts) + "\n"


def summed(rows: Iterable[Row], tasks: int) -> list[Row]:
    """One row for each contestant and budget that has rows of all tasks."""
    sums: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        sums.setdefault((row["contestant"], row["budget"]), []).append(row)
    return [
        {"contestant": name, "budget": budget, **{n: sum(row[n] for row in part) for n in ("dense", "kept")}}
        for (name, budget), part in sums.items()
        if len(part) == tasks
    ]


def table(rows: Sequence[Row]) -> str:
    """One line a contestant, one column a budget."""
    budgets = sorted({row["budget"] for row in rows})
    cells = {(row["contestant"], row["budget"]): f"{row['kept']} of {row['dense']}" for row in rows}
    lines = [["", *(f"budget {budget}" for budget in budgets)], ["---"] * (len(budgets) + 1)]
    names = dict.fromkeys(row["contestant"] for row in rows)
    lines += [[name, *(cells.get((name, budget), "") for budget in budgets)] for name in names]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
