"""CUDA graphs of steps: the first step of a kind runs as it is, the second is captured, and replayed from then on."""

from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor


class Replay:
    """Runs work that only launches kernels on tensors that stay where they are, and returns the tensor that it makes.

    captures: on a GPU, unless one of the operations waits for the host; else work always runs as it is.
    """

    def __init__(self, device: torch.device, operations: Collection[str] = ()):
        self.device = device
        self.captures = device.type == "cuda" and not any(_waits(operation, device) for operation in operations)
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None  # the graphs of a session never run at once, so they share memory

    def __call__(self, kind: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns, which the next run of this kind overwrites."""
        if not self.captures:
            return work()
        if kind not in self._seen:  # compiles kernels and fills the libraries' workspaces, which no capture may do
            self._seen.add(kind)
            return work()
        if kind not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = work()
            self._pool = self._pool or graph.pool()
            self._graphs[kind] = graph, result
        graph, result = self._graphs[kind]
        graph.replay()
        return result


def _waits(operation: str, device: torch.device) -> bool:
    """Whether it reads sizes from the device, which no capture may do: experts that torch multiplies one by one."""
    older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return operation == "keysieve::grouped_matmul" or (operation == "aten::_grouped_mm" and older)
