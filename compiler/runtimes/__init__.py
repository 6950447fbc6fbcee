"""What runs a compiled graph: one runtime a file. A session talks to all of them in the same way."""

from typing import Any, Protocol

import numpy as np


class Buffer(Protocol):
    """Memory of the runtime that inputs and outputs are bound to."""

    @property
    def array(self) -> np.ndarray:
        """What it holds now; the memory itself where that is the host's, else a copy."""

    @property
    def nbytes(self) -> int:
        """Its size."""


class Binding(Protocol):
    """The inputs and outputs of one session. What is bound, of its own buffers, stays bound until something else is."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer of zeros; dtype: float32, float16, bfloat16, int32 or int64."""

    def buffer(self, value: np.ndarray) -> Buffer:
        """A buffer that holds `value`; a runtime of the host uses the very memory of `value`."""

    def input(self, name: str, buffer: Any) -> None:
        """Read the input from the buffer."""

    def output(self, name: str, buffer: Any) -> None:
        """Write the output to the buffer, which may be that of an input."""

    def feed(self, name: str, value: np.ndarray) -> None:
        """Read the input from a host array, which stays as it is until the next run is over."""

    def run(self) -> None:
        """Run the graph, and wait for it."""

    def close(self) -> None:
        """Let go of every buffer."""


class Runtime(Protocol):
    """A loaded graph."""

    def check(self, batch: int, capacity: int, chunk: int) -> None:
        """Raise EngineError unless the graph can serve as many sequences, rows a cache, and tokens a step."""

    def binding(self) -> Binding:
        """A new binding."""
