"""On an NVIDIA GPU: a plan that evicts against the same plan dense, and one eviction round against copying its bytes.

    python benchmarks/gpu.py BUNDLE [--budget 2048] [--history 8192] [--pairs 5] [-o FILE]

BUNDLE: compiled with --target tensorrt-rtx or tensorrt, for this GPU and at least `history` + interval rows
(--max-capacity). Decoding is timed A B A B: A evicts at `budget`, B is dense and holds `history` rows. A round is timed
on the kernels alone (36 layers, 8 KV heads, D 128, bfloat16, 2,176 -> 2,048 rows), against copies of as many bytes. No
figures of this script are published yet: nobody has run it.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import decode, fill

from keysieve.compiler.bundle import write_atomically
from keysieve.compiler.engine import Engine, load
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.kernels.triton.traffic import Round, minimum

MODEL = KernelConfiguration(36, 32, 8, 128, 128, 128, "bfloat16")
ROUND = Round(rows=2176, budget=2048, moved=2044, capacity=2304)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--history", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU that torch can use")
    result = {
        "gpu": torch.cuda.get_device_name(),
        "decode": decoding(load(options.bundle, device="cuda"), options.budget, options.history, options.pairs),
        "round": eviction_round(options.pairs),
    }
    print(json.dumps(result, indent=1))
    if options.output:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")


def decoding(engine: Engine, budget: int, history: int, pairs: int) -> dict[str, Any]:
    """Milliseconds a token, one interval of tokens a side."""
    interval = int(engine.manifest["eviction"]["interval"])
    evicting = engine.session(budget=budget)
    fill(evicting, budget + interval)
    decode(evicting, interval)
    sides: dict[str, list[float]] = {"evicting": [], "dense": []}
    for _ in range(pairs):
        sides["evicting"].append(1e3 * sum(decode(evicting, interval)) / interval)
        dense = engine.session(dense=True, capacity=history + interval)
        fill(dense, history)
        sides["dense"].append(1e3 * sum(decode(dense, interval)) / interval)
        dense.close()
    ratios = [b / a for a, b in zip(sides["evicting"], sides["dense"], strict=True)]
    return {"budget": budget, "history": history, "ms": sides, "speedups": ratios, "speedup": statistics.median(ratios)}


def eviction_round(pairs: int) -> dict[str, Any]:
    """Microseconds of score, select and 36 updates, and of a copy that reads and writes the least bytes of a round."""
    from keysieve.kernels.triton import launch

    model, work = MODEL, ROUND
    like = {"device": "cuda", "dtype": torch.bfloat16}
    shape = (1, model.kv_heads, work.capacity, model.head_dim)
    keys, values = ([torch.randn(shape, **like) for _ in range(model.layers)] for _ in range(2))
    new = torch.randn(1, model.kv_heads, 1, model.head_dim, **like)
    heads = (model.layers, 1, model.query_heads)
    centre = torch.randn(*heads, 1, model.head_dim, device="cuda")
    weight = torch.rand(*heads, model.rotary_dim // 2, device="cuda")
    rows, budget, none = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (work.rows, work.budget, 0))
    position = torch.tensor([work.rows], device="cuda")

    def evict() -> None:
        scores = launch.score(model, rows, rows, position, centre, weight, keys)
        plan, keep, _ = launch.select(model, scores, rows, rows, budget, none)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            launch.update(model, new, new, rows, plan, keep, key, value, layer)

    half = minimum(model, work) // 2
    source, target = (torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2))
    evict()  # compiles
    sides: dict[str, list[float]] = {"round": [], "copy": []}
    for _ in range(pairs):
        sides["round"].append(microseconds(evict))
        sides["copy"].append(microseconds(lambda: target.copy_(source)))
    ratios = [a / b for a, b in zip(sides["round"], sides["copy"], strict=True)]
    return {"bytes": 2 * half, "us": sides, "ratio": statistics.median(ratios)}


def microseconds(work: Callable[[], object], times: int = 20) -> float:
    """Median time of one call on the GPU."""
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        taken.append(1e3 * start.elapsed_time(end))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
