"""Threads that stand for the processes of a torch.distributed group."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np

from keysieve.compiler.workers import Workers


class Threads:
    """Stands for Workers: threads of this process, which meet at a barrier."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.values: list[Any] = [None] * count
        self.local = threading.local()

    def run(self, count: int, call: Any) -> list[Any]:
        def start(rank: int) -> Any:
            self.local.rank = rank
            try:
                return call()
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(count) as pool:
            return [future.result() for future in [pool.submit(start, rank) for rank in range(count)]]

    def __call__(self) -> Workers:
        workers = Workers()
        workers.rank, workers.count = self.local.rank, len(self.values)
        workers.gather = partial(self.gather, workers.rank)  # type: ignore[method-assign]
        workers.on_first = lambda call: workers.gather(call() if workers.first else None)[0]  # type: ignore[method-assign,assignment]
        workers.sum = lambda array: sum(workers.gather(array), np.zeros_like(array))  # type: ignore[method-assign]
        return workers

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = deepcopy(value)  # as if it had been sent
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values
