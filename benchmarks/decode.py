"""Cost of eviction while decoding: the same engine, evicting and not, at the same rows, A B A B in one process.

    python benchmarks/decode.py [BUNDLE] [--budgets 512,2048] [--pairs 5] [--threads 1] [--device cpu|cuda]

A decodes `interval` tokens on an evicting session (rows go from budget to budget + interval, then one round); B the
same number on a dense session that starts at `budget` rows. Both have the same capacity. The ratio of each pair and
the median are printed, and what the round itself costs (the slowest steps against the median step).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from keysieve.compiler.bundle import write_atomically
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=Path("build/demo"), help="(default build/demo, of `make demo`)"
    )
    parser.add_argument("--budgets", default="512,2048")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the bundle's TensorRT plan")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    engine = load(options.bundle, options.threads, options.device)
    rows = [measure(engine, int(budget), options.pairs) for budget in options.budgets.split(",")]
    for row in rows:
        print(
            f"budget {row['budget']:5d}: evicting {row['evicting_ms']:.2f} ms/token, dense {row['dense_ms']:.2f}, "
            f"ratio {row['ratio']:.3f} (pairs {', '.join(f'{r:.3f}' for r in row['ratios'])}), "
            f"a round costs {row['round_ms']:.1f} ms"
        )
    if options.output:
        write_atomically(options.output, json.dumps({"threads": options.threads, "rows": rows}, indent=1) + "\n")


def measure(engine: Engine, budget: int, pairs: int) -> dict[str, object]:
    """Both sides at one budget."""
    interval = int(engine.manifest["eviction"]["interval"])
    capacity = budget + interval
    evicting = engine.session(budget=budget, capacity=capacity)
    fill(evicting, budget + interval)  # due: the first decoded token executes a round
    decode(evicting, interval)
    ratios, evicting_ms, dense_ms, extra = [], [], [], []
    for _ in range(pairs):
        times = decode(evicting, interval)
        dense = engine.session(dense=True, capacity=capacity)
        fill(dense, budget)
        baseline = decode(dense, interval)
        dense.close()
        ratios.append(sum(times) / sum(baseline))
        evicting_ms.append(1e3 * sum(times) / interval)
        dense_ms.append(1e3 * sum(baseline) / interval)
        # a round shows in two steps: the one that scores and selects, and the next, which compacts
        usual = statistics.median(times)
        extra.append(1e3 * sum(time - usual for time in sorted(times)[-2:]))
    return {
        "budget": budget,
        "interval": interval,
        "evicting_ms": statistics.median(evicting_ms),
        "dense_ms": statistics.median(dense_ms),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "round_ms": statistics.median(extra),
    }


def fill(session: Session, rows: int, chunk: int = 128) -> None:
    """Feed `rows` tokens."""
    ids = np.arange(5, 5 + chunk)[None]
    for _ in range(rows // chunk):
        session.step(ids, np.array([chunk], np.int32), np.zeros((1, 1), np.int64))


def decode(session: Session, tokens: int) -> list[float]:
    """Seconds of every one-token step."""
    one, index, times = np.ones(1, np.int32), np.zeros((1, 1), np.int64), []
    for token in range(tokens):
        started = time.perf_counter()
        session.step(np.array([[100 + token]]), one, index)
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
