"""The processes that calibrate together: one alone, or those of a torch.distributed group."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from keysieve.errors import ConfigError, KeySieveError

Result = TypeVar("Result")


class Workers:
    """This process among its peers: `rank` of `count`. All methods must be called by every process, in one order.

    The peers are those of the torch.distributed group that is initialised, of whatever backend; without one, the
    process is alone and every method is what a single process would do.
    """

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1
        self._group = distributed.new_group(backend="gloo") if self.count > 1 else None  # sums lie on the CPU

    @property
    def first(self) -> bool:
        """Whether this process is the one that reads and writes the statistics, and speaks."""
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """Everybody's value, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def on_first(self, call: Callable[[], Result]) -> Result:
        """What the first process gets from the call, for all; a KeySieveError there is raised everywhere."""
        if self.count == 1:
            return call()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = call()
            except KeySieveError as error:
                answer[1] = error
        distributed.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def check_equal(self, what: str, value: Any) -> None:
        """Raise ConfigError unless everybody has the same value."""
        values = self.gather(value)
        differ = [rank for rank, other in enumerate(values) if other != values[0]]
        if differ:
            raise ConfigError(
                f"process {differ[0]} has another {what} than process 0; give all of them the same arguments and files"
            )

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of everybody's array, float64."""
        if self.count == 1:
            return array
        total = torch.from_numpy(array.copy())
        distributed.all_reduce(total, group=self._group)
        return total.numpy()

    def on_this_machine(self) -> int:
        """How many of the processes share this machine."""
        name = socket.gethostname()
        return self.gather(name).count(name)


@contextmanager
def process_group() -> Iterator[None]:
    """Inside `torchrun`, the group of the processes that it started; elsewhere, nothing."""
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield
        return
    distributed.init_process_group(backend="gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()
