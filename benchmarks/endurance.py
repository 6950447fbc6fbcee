"""Memory of a long generation: KV bytes and resident memory over thousands of tokens at a small budget.

    python benchmarks/endurance.py [BUNDLE] [--tokens 4096] [--budget 256]

Prints rows held, rows evicted, KV bytes and resident memory after the first round and along the way, the drift of
resident memory since then, and checks the counters against arithmetic.
"""

import argparse
import json
import os
import time
from pathlib import Path

from keysieve.compiler.bundle import write_atomically
from keysieve.compiler.engine import load

PROMPT = "Tell me the story of a lighthouse keeper and the sea, chapter by chapter, and never stop."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=Path("build/demo"), help="(default build/demo, of `make demo`)"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    engine = load(options.bundle, options.threads)
    interval = int(engine.manifest["eviction"]["interval"])
    started, samples, tokens = time.perf_counter(), [], 0
    stream = engine.stream(
        PROMPT, max_new_tokens=options.tokens, budget=options.budget, stop_tokens=[], temperature=0.8, seed=0, chat=True
    )
    for tokens, _ in enumerate(stream, 1):
        if tokens % 512 and (samples or tokens % interval):  # counters are a snapshot that takes time
            continue
        counters = engine.counters
        if counters.rounds[0]:
            samples.append(
                {
                    "tokens": tokens,
                    "rows_held": counters.rows_held[0],
                    "rows_evicted": counters.rows_evicted[0],
                    "kv_bytes": counters.kv_bytes,
                    "resident_bytes": resident_bytes(),
                }
            )
            print("  ".join(f"{name} {value:,}" for name, value in samples[-1].items()), flush=True)
    counters = engine.counters
    fed = counters.tokens[0]  # prompt and all generated tokens but the last, which is never fed
    rounds = counters.rounds[0]
    first, last = samples[0], samples[-1]
    drift = last["resident_bytes"] / first["resident_bytes"] - 1
    held, evicted = counters.rows_held[0], counters.rows_evicted[0]
    uniform = engine.manifest["eviction"]["heads"] == "uniform"  # else wide heads still grow when narrow ones evict
    exact = held + evicted == fed and (evicted == rounds * interval if uniform else held <= options.budget + interval)
    result = {
        "tokens": tokens,
        "fed": fed,
        "budget": options.budget,
        "rounds": rounds,
        "rows_held": held,
        "rows_evicted": evicted,
        "counters_exact": exact,
        "kv_bytes_constant": len({sample["kv_bytes"] for sample in samples}) == 1,
        "resident_drift": drift,
        "tokens_per_s": engine.timing.tokens_per_s,
        "samples": samples,
    }
    print(
        f"{tokens:,} tokens in {time.perf_counter() - started:.0f} s: {rounds} rounds, counters exact: {exact}, "
        f"KV bytes constant: {result['kv_bytes_constant']}, resident memory drift {100 * drift:+.2f} %"
    )
    if options.output:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")


def resident_bytes() -> int:
    """Resident set of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
