"""docs/benchmarks.md and its pictures, made of benchmarks/results/cpu.json and of nothing else."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from line_chart import Points, line_chart
from ratios import TARGETS, Row, entry_of

from keysieve.compiler.bundle import write_atomically

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = "pictures"
MB = 1e6
SERIES = {"memory": [("int4", 512), ("int4", 2048), ("float32", 2048)], "endless": [("int4", 1024)]}
CELLS = {  # column -> field, factor, format
    "ms/token": ("ms_per_token", 1, ".2f"),
    "ms CPU": ("ms_cpu", 1, ".2f"),
    "tokens/s": ("ms_cpu", 0, ".1f"),
    "round, ms CPU": ("round_ms_cpu", 1, ".1f"),
    "copy, ms CPU": ("copy_ms_cpu", 1, ".1f"),
    "not due, us CPU": ("idle_us_cpu", 1, ".0f"),
    "share of decode time": ("round_share", 100, ".2f"),
    "KV MB": ("kv_bytes", 1 / MB, ".1f"),
    "load, s": ("load_s", 1, ".1f"),
    "loaded MB": ("loaded_rss", 1 / MB, ".0f"),
    "peak MB": ("peak_rss", 1 / MB, ".0f"),
    "growth of resident memory, %": ("rss_drift", 100, ".1f"),
    "counters exact": ("counters_exact", None, ""),
    "KL, nats": ("kl", 1, ".4f"),
    "KL p95": ("kl_p95", 1, ".4f"),
    "top-1, %": ("top1", 100, ".1f"),
    "perplexity": ("ppl", 1, ".2f"),
    "float32": ("ppl_dense", 1, ".2f"),
}


MEMORY = ("load, s", "loaded MB", "ms CPU", "KV MB", "peak MB", "growth of resident memory, %")


def write_report(result: dict[str, Any]) -> None:
    """Write the document and its pictures."""
    (DOCS / PICTURES).mkdir(exist_ok=True)
    for file, text in report(result).items():
        write_atomically(DOCS / file, text)


def report(result: dict[str, Any]) -> dict[str, str]:
    """File below docs/ -> its whole text."""
    pictures = _pictures(result["rows"])
    return {"benchmarks.md": _document(result, pictures), **{file: svg for file, (_, svg) in pictures.items()}}


def _document(result: dict[str, Any], pictures: dict[str, tuple[str, str]]) -> str:
    rows, machine = result["rows"], result["machine"]

    def shown(workload: str) -> str:
        return "".join(f"\n![{title}]({file})\n" for file, (title, _) in pictures.items() if f"/{workload}" in file)

    return f"""# Benchmarks on a CPU

{machine["cpu"]} ({", ".join(machine["instructions"])}), {machine["cores"]} cores, {machine["memory_gb"]} GB, \
{machine["system"]}. SmolLM2-135M-Instruct; the same weights for all.

    make bench BENCH=benchmarks/cpu.py BENCH_ARGS='--ignore-position-limit --endless --official DIR'

measures this (`python benchmarks/cpu.py --help`: any part of it), writes \
[cpu.json](../benchmarks/results/cpu.json), which has every sample, and makes this file and its pictures of it. \
Contestants run in processes of their own, pinned to as many cores as they have threads, and all of one comparison \
stay loaded and take turns: a ratio is the median over turns of the ratios within a turn. A turn is 128 greedy tokens, \
so it holds one round of everybody who evicts in rounds. **ms CPU** is the time that a process computed, the measure \
to trust on a shared machine; ratios and targets are of it. With a batch, a token is one of every sequence. 32k tokens \
are beyond the 8,192 positions of this model: such rows say what it costs, not what it writes. **at**: the last commit \
that had changed the engine when a row was measured; rows without one are older.

## Contestants

{_contestants(result["versions"])}
* **keysieve-dense** is the same engine that never evicts; **onnxruntime** the plain decoder of ONNX Runtime's own \
model builder, held at the rows that keysieve keeps; **hf** eager PyTorch with SDPA; **llama.cpp** a window of the \
first 4 and the last rows, whose positions a few lines of Python shift (it scores nothing); **kvpress** its \
DecodingPress every 128 tokens; **openvino-genai** its own eviction, after the prompt was read whole; **official** the \
paper's HuggingFace code.
* weights/KV: int4 means blocks of 32 (keysieve, ONNX Runtime), groups of 64 (OpenVINO), Q4_1 (llama.cpp).

## Targets

{_targets(result)}
## Decoding

"all": it keeps every row. "round": what eviction adds to the step that takes longest, and the one \
beside it (the steps of an interval are medians over turns). "peak": of the whole process, with the prompt.

{_table(rows, "decode", "ms/token", "ms CPU", "tokens/s", "round, ms CPU", "KV MB", "peak MB")}{shown("decode")}
## Length of the history

{_table(rows, "length", "ms/token", "ms CPU", "KV MB")}
## Prefill

{_table(rows, "prefill", "ms/token", "ms CPU", "tokens/s", "KV MB", "peak MB")}
## Tokens of a prompt a step

{_chunks(rows)}
## Memory

A fresh process loads the model, reads the prompt and generates. Peak: of the whole process, files that it maps \
included.

{_table(rows, "memory", *MEMORY)}{shown("memory")}
## One eviction round

"copy": copying keys and values of as many rows as the budget once, in every layer. "not due": what eviction adds to \
a step without a round.

{_table(rows, "round", "round, ms CPU", "copy, ms CPU", "share of decode time", "not due, us CPU")}
## Endless text

{_table(rows, "endless", "ms/token", "ms CPU", "KV MB", "growth of resident memory, %", "counters exact")}\
{shown("endless")}
## What quantisation costs, without any eviction

Teacher-forced on English text, against the same engine in float32: loss of quantisation is not loss of eviction.

{_table(rows, "fidelity", "KL, nats", "KL p95", "top-1, %", "perplexity", "float32")}
## Ratios

{_ratios(result["ratios"])}"""


def _contestants(versions: dict[str, Any]) -> str:
    lines = []
    for name, found in sorted(versions.items()):
        words = (
            found if isinstance(found, str) else ", ".join(f"{library} {number}" for library, number in found.items())
        )
        lines.append((name, words))
    return _markdown(("contestant", "versions"), lines)


def _targets(result: dict[str, Any]) -> str:
    lines = []
    for target in TARGETS:
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        for name, value in target.of(result):
            lines.append((target.text, name, bound, f"{value:.3g}", "yes" if target.reached(value) else "**no**"))
        if not target.of(result):
            lines.append((target.text, "", bound, "not measured", ""))
    return _markdown(("target", "of", "bound", "measured", "reached"), lines)


def _table(rows: Sequence[Row], workload: str, *columns: str) -> str:
    head = ("history", "budget", "batch", "contestant", "threads", *columns, "at")
    chosen = [row for row in rows if row["workload"] == workload]
    if not chosen:
        return "Not measured.\n"
    chosen.sort(key=lambda row: (row["history"], row["batch"], row["budget"] or 0, row["weights"], str(entry_of(row))))
    lines = []
    for row in chosen:
        kept = "all" if row["budget"] is None else str(row["budget"])
        where = (f"{row['history']:,}", kept, str(row["batch"]), str(entry_of(row)), str(row["threads"]))
        lines.append((*where, *(_cell(row, column) for column in columns), row.get("revision", "")))
    return _markdown(head, lines)


def _chunks(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row["workload"].startswith("chunk ")]
    if not chosen:
        return "Not measured.\n"
    chosen.sort(key=lambda row: (str(entry_of(row)), int(row["workload"].split()[1])))
    lines = [
        (
            *(str(entry_of(row)), f"{row['history']:,}", str(row["budget"]), row["workload"].split()[1]),
            *(_cell(row, column) for column in ("ms CPU", "peak MB")),
            row.get("revision", ""),
        )
        for row in chosen
    ]
    return _markdown(("contestant", "prompt", "budget", "tokens a step", "ms CPU", "peak MB", "at"), lines)


def _cell(row: Row, column: str) -> str:
    name, factor, form = CELLS[column]
    value = row.get(name)
    if value is None:
        return ""
    if factor is None:
        return "yes" if value else "**no**"
    if factor == 0:  # per second
        return format(1e3 * row["batch"] / value, form)
    return format(value * factor, form)


def _ratios(ratios: dict[str, Any]) -> str:
    lines = [
        (
            name,
            f"{found['cpu']['median']:.3f}",
            f"{found['wall']['median']:.3f}",
            _span(found["cpu"]["pairs"]),
            found.get("revision", ""),
        )
        for name, found in sorted(ratios.items())
    ]
    return _markdown(("ratio", "CPU time", "wall clock", "CPU time of the turns", "at"), lines)


def _span(pairs: Sequence[float]) -> str:
    return f"{min(pairs):.3f} to {max(pairs):.3f} ({len(pairs)})"


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)


def _pictures(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """File -> title and SVG: speed over the history, and speed and memory over generated tokens."""
    made: dict[str, tuple[str, str]] = {}

    def add(name: str, title: str, x_label: str, y_label: str, lines: dict[str, Points]) -> None:
        if any(line.startswith("keysieve ") for line in lines):
            made[f"{PICTURES}/{name}.svg"] = title, line_chart(title, x_label, y_label, lines)

    for weights in ("int4", "float32"):
        for budget in (512, 1024, 2048):
            taken = [
                row
                for row in rows
                if (row["workload"], row["weights"], row["batch"]) == ("decode", weights, 1)
                and row["budget"] in (None, budget)
                and row["policy"] != "plain"
            ]
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(taken, key=lambda row: row["history"]):
                lines.setdefault(str(entry_of(row)), []).append((row["history"], row["ms_cpu"]))
            title = f"Decoding, {weights} weights, budget {budget}"
            add(f"decode-{weights}-{budget}", title, "tokens of history", "ms CPU a token", lines)
    for workload, settings in SERIES.items():
        for weights, budget in settings:
            taken = [
                row
                for row in rows
                if row["workload"] == workload and row["weights"] == weights and row["budget"] in (None, budget)
            ]
            setting = f"{weights} weights, budget {budget}"
            for field, factor, label in (("ms_cpu", 1, "ms CPU a token"), ("rss", 1 / MB, "resident MB")):
                title = f"{'Speed' if field == 'ms_cpu' else 'Memory'} over generated tokens, {setting}"
                series = {
                    str(entry_of(row)): [(point["tokens"], point[field] * factor) for point in row["series"]]
                    for row in taken
                }
                add(f"{workload}-{field.split('_')[0]}-{weights}-{budget}", title, "generated tokens", label, series)
    return made
