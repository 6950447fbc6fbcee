"""docs/gpu.md out of benchmarks/results/gpu.json: python benchmarks/gpu/page.py [RESULTS [PAGE]]

What nobody has measured is called "not measured".
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS, PAGE = REPOSITORY / "benchmarks" / "results" / "gpu.json", REPOSITORY / "docs" / "gpu.md"
NOTHING = "not measured"

HEAD = """# On a GPU

Made by `python benchmarks/gpu/page.py` of [gpu.json](../benchmarks/results/gpu.json), a copy of the \
`build/gpu-results/gpu.json` that `make gpu` writes on a machine with an NVIDIA GPU, after `make gpu-pack` there or \
elsewhere. [torch.md](torch.md) is about the engine, [kernels.md](kernels.md) about the kernels.
"""

NEVER = """## Not measured

* TensorRT and TensorRT-RTX plans have not run on any GPU: TensorRT-RTX 1.7 makes none for the one at hand. The plugin \
library inside them ran, driven through TensorRT's own interface (above).
* Any other GPU than the one above, several GPUs, and models other than those named.
* Answers: the weights of the large model are random. Quality is measured on a CPU, with the same graph \
([benchmarks.md](benchmarks.md)).
"""


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    page.write_text(text(json.loads(results.read_text(encoding="utf-8"))), encoding="utf-8")


def text(content: dict[str, Any]) -> str:
    """The page of a results file."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for result in content["results"]:
        by_stage.setdefault(result["stage"], []).append(result)
    parts = [
        HEAD,
        _machine(content, by_stage),
        _correct(content["stages"], by_stage),
        _decoding(by_stage),
        _attention(by_stage),
        _rounds(by_stage),
        NEVER,
    ]
    return "\n".join(parts)


def _machine(content: dict[str, Any], by_stage: dict[str, Any]) -> str:
    found = (by_stage.get("environment") or [{}])[0]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "transformers") if name in found)
    return (
        f"{found.get('gpu', NOTHING)}, {found.get('memory_GB', '?')} GB, {found.get('processors', '?')} processors; "
        f"{versions}; commit {content['commit']}. A large copy moves {found.get('copy_TB_per_s', '?')} TB/s, read and "
        f"written. The whole check took {content['seconds']} s. {content.get('earlier', '')}\n"
    )


def _correct(stages: dict[str, Any], by_stage: dict[str, Any]) -> str:
    rows = []
    for name, title in (
        ("kernels", "Triton kernels beside the reference, over shapes, dtypes and edge cases"),
        ("memcheck", "compute-sanitizer memcheck of the plugin's kernels"),
        ("racecheck", "compute-sanitizer racecheck of the plugin's kernels"),
    ):
        log = stages.get(name, {}).get("log") or [NOTHING]
        rows.append((title, log[-1].strip("= ")))
    plugins = by_stage.get("plugin", [])
    equal = [p for p in plugins if p.get("plans_equal") and p.get("caches_equal") and p["score_error"] < 1e-5]
    rows.append(
        (
            "the TensorRT plugin library, createPlugin and enqueue, with machine code and with PTX that the driver "
            "compiles: scores to 1e-5, plans and caches equal",
            f"{len({p['library'] for p in equal})} of {len({p['library'] for p in plugins})} libraries"
            if plugins
            else NOTHING,
        )
    )
    for one in by_stage.get("tokens", []):
        what = one.get("failed") or (
            f"{one['same']:,} of {one['of']:,} tokens, counters {'equal' if one['counters_equal'] else 'differ'}, "
            f"rounds {', '.join(map(str, one['rounds']))}"
        )
        rows.append((f"torch engine, tiny {one['model']}: tokens of the GPU that are the CPU's", what))
    return "## It is right\n\n" + _table(("what", "found"), rows)


def _decoding(by_stage: dict[str, Any]) -> str:
    found = {(r["engine"], r["batch"], r["history"]): r for r in by_stage.get("decoding", [])}
    theirs = {(r["batch"], r["history"]): r for r in by_stage.get("huggingface", [])}
    rows = []
    for batch in sorted({batch for _, batch, _ in found}):
        for history in (None, 8192, 32768):
            ours = [found.get((engine, batch, history), {}) for engine in ("plain", "compiled")]
            evicting = [found.get((engine, batch, None), {}) for engine in ("plain", "compiled")]
            if not any(ours):
                continue
            gains = [_ratio(a.get("ms"), b.get("ms")) for a, b in zip(ours, evicting, strict=True)]
            rows.append(
                (
                    batch,
                    f"dense, {history:,} rows" if history else "budget 2,048",
                    *(_number(one.get("ms"), 2) for one in ours),
                    *(_number(one.get("tokens_per_s"), 0) for one in ours),
                    _number(ours[0].get("bound_ms"), 2),
                    *(gains if history else ("", "")),
                    _number(theirs.get((batch, history), {}).get("ms"), 2) if history else "",
                )
            )
    head = ("batch", "cache", "ms a token", "compiled", "tokens/s", "compiled", "bound, ms")
    head += ("gain of the budget", "compiled", "transformers, ms")
    parts = [
        "## A model of Qwen3-8B's shape\n",
        "36 layers, 8 KV heads, bfloat16, random weights, greedy, through `Engine`'s own loop; one eviction round in "
        "128 tokens is part of the time. *compiled*: the step fused by `--compile`. *dense*: the same engine, which "
        "holds every row and computes no scores. *bound*: bytes of weights and rows over 3.35 TB/s. *gain*: time of "
        "the dense engine over that at the budget. *transformers*: a static cache, step by step.\n",
        _table(head, rows),
    ]
    batches = {r["dense"]: r for r in by_stage.get("largest batch", [])}
    if all("sequences" in batches.get(dense, {}) for dense in (False, True)):
        most, dense = batches[False], batches[True]
        parts.append(
            f"**Memory**: with 32,768 tokens of history {dense['sequences']} sequences fit without eviction "
            f"({dense['kv_GB']} GB of keys and values), and {most['sequences']} at a budget of 2,048 rows "
            f"({most['kv_GB']} GB), {most['sequences'] / dense['sequences']:.1f} times as many.\n"
        )
    prompts = {r["dense"]: r for r in by_stage.get("prompt", [])}
    if prompts:
        told = [f"{'dense' if d else 'at the budget'} {r.get('s', NOTHING)} s" for d, r in sorted(prompts.items())]
        other = (by_stage.get("huggingface prompt") or [{}])[0].get("s", NOTHING)
        parts.append(
            f"**Prompts** of 8,192 tokens, in chunks of 512: {', '.join(told)}; transformers, at once, {other} s.\n"
        )
    return "\n".join(parts)


def _attention(by_stage: dict[str, Any]) -> str:
    rows = []
    for one in by_stage.get("attention", []):
        if "us" not in one:
            continue
        us = one["us"]
        rows.append(
            (
                one["tokens"],
                one["batch"],
                f"{one['rows']:,}",
                us["keysieve"],
                us.get("keysieve, capacity twice the rows", ""),
                us["torch"],
                us.get("copy of the bytes", ""),
                one.get("of_copy_bandwidth", ""),
                f"{one['error']:.1e}",
            )
        )
    head = ("tokens", "batch", "rows", "keysieve", "half of the cache empty", "torch SDPA", "copy of the bytes")
    return (
        "## Attention over the cache\n\nOne layer, 32 query and 8 KV heads, D 128, bfloat16; microseconds, replayed "
        "from a CUDA graph with a cold L2 cache. *of the copy*: bandwidth relative to a copy of the same bytes. "
        "*error*: beside float64.\n\n" + _table((*head, "of the copy", "error"), rows)
    )


def _rounds(by_stage: dict[str, Any]) -> str:
    rows = []
    for one in by_stage.get("round", []):
        if "us" in one:
            rows.append((one["batch"], *one["us"].values(), one["of_copy"]))
    names = list(next((one["us"] for one in by_stage.get("round", []) if "us" in one), {}))
    return (
        "## An eviction round\n\nAll 36 layers, 2,176 to 2,048 rows; microseconds. A round is score, select and the "
        "updates of the step after it; the copy moves the bytes that any implementation must.\n\n"
        + _table(("batch", *names, "round of the copy"), rows)
    )


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else NOTHING


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rows = [" | ".join(str(cell) for cell in row) for row in rows]
    if not rows:
        return f"{NOTHING}\n"
    lines = [" | ".join(head), " | ".join("---" for _ in head), *rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
