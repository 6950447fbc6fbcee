"""Growth of capture and passes with the number of layers: a Llama of 70B proportions, without its weights.

    python benchmarks/layers.py [--layers 2,8,32,64] [-o FILE]

Each count runs `compile --dry-run` (online centres) in a process of its own, on one thread. CPU seconds, since they
do not depend on what else a machine does, of the stages load, capture, match and rewrite; peak resident memory; and
the seconds of every layer added since the count before, against the same of the two counts before that: 1 is linear.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keysieve.compiler.bundle import write_atomically
from keysieve.compiler.progress import Progress, Stage

STAGES = ("load", "capture", "match", "rewrite")


class CpuSeconds(Progress):
    """Keeps the CPU seconds and the note of every stage."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stages: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        stage, start = Stage(), time.process_time()
        yield stage
        self.stages[name], self.notes[name] = time.process_time() - start, stage.text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="2,8,32,64")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # measure here, and print JSON
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows: list[dict[str, Any]] = []
    for layers in map(int, options.layers.split(",")):
        command = [sys.executable, __file__, "--one", str(layers)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        row["ratio"] = growth([*rows, row])
        rows.append(row)
        parts = "  ".join(f"{stage} {row['cpu_s'][stage]:.2f}" for stage in STAGES)
        ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} times the layers before"
        print(
            f"{layers:3d} layers: {row['total_cpu_s']:.1f} s CPU ({parts}), peak {row['peak_mb']:,.0f} MB, "
            f"captured {row['captured']}, rewritten {row['rewritten']}{ratio}",
            flush=True,
        )
    if options.output:
        write_atomically(options.output, json.dumps({"rows": rows}, indent=1) + "\n")


def growth(rows: list[dict[str, Any]]) -> float | None:
    """CPU seconds of a layer between the last two counts, relative to those between the two before."""
    if len(rows) < 3:
        return None
    first, second = (
        (after["total_cpu_s"] - before["total_cpu_s"]) / (after["layers"] - before["layers"])
        for before, after in (rows[-3:-1], rows[-2:])
    )
    return second / first


def measure(layers: int) -> dict[str, Any]:
    """One dry run of that many layers."""
    import torch
    from transformers import LlamaConfig

    from keysieve.compiler.compile import compile
    from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig

    torch.set_num_threads(1)
    model = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    config = CompileConfig(EvictionConfig(PolicyConfig("triattention", centres="online")), dtype="float16")
    seconds = CpuSeconds()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        report = compile(folder, Path(folder) / "bundle", config, seconds, dry_run=True)
    return {
        "layers": layers,
        "matched": sum(layer.matched for layer in report.layers),
        "cpu_s": {stage: seconds.stages[stage] for stage in STAGES},
        "total_cpu_s": sum(seconds.stages[stage] for stage in STAGES),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux gives KiB
        "captured": seconds.notes["capture"],
        "rewritten": seconds.notes["rewrite"],
    }


if __name__ == "__main__":
    main()
