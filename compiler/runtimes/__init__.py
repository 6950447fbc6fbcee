"""What runs a compiled graph: one runtime a file. A session talks to all of them in the same way."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from keysieve.compiler.decoding import Tokens
    from keysieve.compiler.sampling import Sampling
    from keysieve.compiler.session import Counters


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


class Session(Protocol):
    """The state of one batch of sequences, and the step that advances it."""

    batch: int
    capacity: int

    @property
    def rows(self) -> np.ndarray:
        """Rows held [B] once the pending plan is executed; of the first window where no layer evicts."""

    @property
    def counters(self) -> "Counters":
        """A snapshot of the counters; planned evictions count as done."""

    def step(self, input_ids: np.ndarray, count: np.ndarray, logits_at: np.ndarray, next_tokens: int = 1) -> np.ndarray:
        """Feed up to S tokens a sequence and return logits [B,N,V] float32, overwritten by the next step with that N.

        input_ids [B,S] int64, right-padded; count [B]: valid tokens of each; logits_at [B,N] int64: token indices whose
        logits are wanted; next_tokens: S of the step after this one, for which room is made.
        """

    def decode(
        self, prompts: Sequence[Sequence[int]], chunk: int, sampling: "Sampling", stops: set[int], most: int
    ) -> "Tokens":
        """Read the prompts and draw at most `most` tokens a sequence; see keysieve.compiler.decoding.decode."""

    def close(self) -> None:
        """Release the buffers."""


class Runtime(Protocol):
    """A loaded graph."""

    def chunk(self, batch: int) -> int | None:
        """Prompt tokens a step for so many sequences where the caller names none; None: the interval."""

    def check(self, batch: int, capacity: int, chunk: int) -> None:
        """Raise EngineError unless the graph can serve as many sequences, rows a cache, and tokens a step."""

    def session(self, manifest: dict[str, Any], batch: int, capacity: int, *options: Any) -> Session:
        """A new session; options as those of keysieve.compiler.session.Session."""
