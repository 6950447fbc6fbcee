"""Where a stage runs, and how it measures: on a GPU, or on a CPU in Triton's interpreter, with tiny sizes."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FLUSH = 256 << 20  # bytes that are read between two runs, so that nothing waits in the L2 cache


@dataclass(frozen=True)
class Place:
    """device: "cuda" or "cpu"; output: the folder of results; built: what `pack.py` made."""

    device: torch.device
    output: Path
    built: Path

    @property
    def tiny(self) -> bool:
        """On a CPU every size is tiny: what runs is the logic, and no time means anything."""
        return self.device.type == "cpu"

    def record(self, stage: str, **values: Any) -> None:
        """Write a result at once, so that what comes later cannot cost it."""
        line = json.dumps({"stage": stage, **values})
        print(line, flush=True)
        with (self.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def attempt(self, stage: str, work: Callable[[], dict[str, Any]], **about: Any) -> None:
        """Record what `work` returns, or why it failed, and go on."""
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a result of this stage
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.record(stage, **about, **found)

    def microseconds(self, work: Callable[[], Any], repeats: int = 30) -> float:
        """The median time of work that only launches kernels, replayed from a CUDA graph with a cold L2 cache."""
        if self.tiny:
            start = time.perf_counter()
            work()
            return 1e6 * (time.perf_counter() - start)
        flush = torch.ones(FLUSH // 4, device=self.device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        times = []
        for _ in range(repeats):
            flush.sum()  # read, so that no dirty lines have to be written back meanwhile
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        return statistics.median(times)

    def copying(self, moved: int) -> float:
        """Microseconds that the GPU takes to copy, reading and writing `moved` bytes in all."""
        source, target = (torch.empty(max(1, moved // 2), dtype=torch.uint8, device=self.device) for _ in range(2))
        return self.microseconds(lambda: target.copy_(source))


def open_place(device: str, output: Path, built: Path) -> Place:
    """The place of a stage; on a CPU, Triton's interpreter stands behind the operations of a GPU."""
    if device == "cpu":
        from keysieve.plugins.torch.cuda import register

        register("cpu")
        torch.set_num_threads(1)
    return Place(torch.device(device), output, built)
