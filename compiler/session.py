"""A session: the state of one batch of sequences on a loaded engine, and the step that advances it.

The engine itself decides when and what to evict. A session only feeds tokens, binds each cache's input and output to
one buffer (so nothing grows and nothing is copied), and carries the plan of one step into the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keysieve.compiler.runtimes import Buffer, Runtime
from keysieve.errors import EngineError

MOST_ROWS = (1 << 31) - 1  # lengths and limits are int32


@dataclass
class Counters:
    """What a session has done. Rows are per sequence, and the same in every KV head of every layer that evicts.

    layers: those that evict; capacity: rows of their caches; kv_bytes: allocated bytes of all caches, those of sliding
    windows included; rounds: evictions executed or planned, summed over sequences.
    """

    batch: int
    layers: int
    capacity: int
    kv_bytes: int
    tokens: list[int] = field(default_factory=list)
    rows_held: list[int] = field(default_factory=list)
    rows_evicted: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)


def one_a_sequence(budget: int | Sequence[int], batch: int) -> np.ndarray:
    """A budget for all, or one a sequence, as [B] int32. Raises EngineError for any other number of them."""
    given = np.atleast_1d(np.asarray(budget, np.int32))
    if given.ndim != 1 or len(given) not in (1, batch):
        raise EngineError(f"{given.size} budgets were given for {batch} prompts; give one for all, or one each")
    return np.broadcast_to(given, (batch,)).copy()


def window_rows(size: int, room: int, total: int | None = None) -> int:
    """Rows of a cache for a window of `size` tokens: the past that the next token sees, and room for new ones."""
    rows = size - 1 + room
    return min(rows, total) if total else rows


class Session:
    """State of `batch` sequences: caches of `capacity` rows, lengths, positions and the pending plan.

    budget: rows kept by an eviction, one for all or one a sequence; None never evicts (the dense engine).
    pinned: rows from the start that are never evicted, one a sequence (a pinned prompt).
    chunk: the most tokens of a step, for which caches of sliding windows get room (None: the interval).
    total: the longest text, which a window need not exceed (None: not known).
    """

    def __init__(
        self,
        runtime: Runtime,
        manifest: dict[str, Any],
        batch: int,
        capacity: int,
        budget: int | Sequence[int] | None,
        pinned: Sequence[int] | None = None,
        initial: dict[str, np.ndarray] | None = None,
        chunk: int | None = None,
        total: int | None = None,
    ):
        if not 0 < capacity < MOST_ROWS:
            raise EngineError(f"capacity is {capacity}; a cache has 1 to {MOST_ROWS - 1:,} rows")
        self.batch, self.capacity = batch, capacity
        self.dense = budget is None
        sizes, eviction = manifest["sizes"], manifest["eviction"]
        self._interval = int(eviction["interval"])
        self._budget = one_a_sequence(capacity if budget is None else budget, batch)
        self._check_room(eviction)
        self._window_sizes = [window["size"] for window in manifest["windows"]]
        room = max(self._interval, chunk or 0)
        self._window_rows = [window_rows(size, room, total) for size in self._window_sizes]
        self._binding = binding = runtime.binding()
        self._caches: dict[str, Buffer] = {}
        for cache in manifest["caches"]:
            rows = capacity if cache["window"] is None else self._window_rows[cache["window"]]
            for name, width in (("key", cache["head_dim"]), ("value", cache["value_dim"])):
                shape = (batch, cache["kv_heads"], rows, width)
                self._caches[f"{name}_{cache['layer']}"] = binding.zeros(shape, manifest["kv_dtype"])
        start = {f"window_length_{index}": np.zeros(batch, np.int32) for index in range(len(self._window_sizes))}
        for state in manifest["states"]:
            start[state["name"]] = np.zeros((batch, *state["shape"]), np.float32)
        self.evicts = sizes["layers"] > 0  # else all layers have windows
        if self.evicts:
            start["length"] = np.zeros(batch, np.int32)
            for name, (layers, _, heads, _) in manifest["plans"].items():
                start[name] = np.zeros((layers, batch, heads, capacity), np.int32)
            start["keep"] = np.full(batch, -1, np.int32)
        for name, value in (initial or {}).items():  # [L, 1, ...] -> [L, B, ...]
            start[name] = np.ascontiguousarray(np.repeat(value.astype(np.float32), batch, axis=1))
        # State that is not updated in place alternates between two buffers.
        self._now = {name: binding.buffer(value) for name, value in start.items()}
        self._next = {name: binding.buffer(np.zeros_like(value)) for name, value in start.items()}
        self._evicted = binding.zeros((batch,), "int32")
        self._pinned = np.zeros(batch, np.int32) if pinned is None else np.asarray(pinned, np.int32)
        self.position = np.zeros(batch, np.int64)
        self._tokens = np.zeros(batch, np.int64)
        self._rounds = np.zeros(batch, np.int64)
        self._total_evicted = np.zeros(batch, np.int64)
        self._layers = sizes["layers"]
        self._kv_bytes = sum(buffer.nbytes for buffer in self._caches.values())
        self._vocab_size = int(manifest["vocab_size"])
        self._logits: tuple[int, Buffer] | None = None
        for name, buffer in self._caches.items():
            binding.input(name, buffer)
            binding.output(f"{name}_next", buffer)
        if self.evicts:
            binding.output("evicted", self._evicted)
            binding.feed("budget", self._budget)
            binding.feed("pinned", self._pinned)

    def _check_room(self, eviction: dict[str, Any]) -> None:
        protected = eviction["sinks"] + eviction["recent"]
        if self.dense:
            return
        if (self._budget <= protected).any():
            raise EngineError(
                f"budget {int(self._budget.min())} leaves no row to choose: the engine always keeps "
                f"{eviction['sinks']} sinks and {eviction['recent']} recent rows; give a budget above {protected}"
            )

    def _check_windows(self, tokens: int) -> None:
        for index, (size, rows) in enumerate(zip(self._window_sizes, self._window_rows, strict=True)):
            held = self._now[f"window_length_{index}"].array
            if (np.minimum(held, size - 1) + tokens > rows).any():
                raise EngineError(
                    f"a step of {tokens} tokens does not fit: caches of the {size}-token window have {rows} rows; feed "
                    f"at most {rows - size + 1} tokens a step, or make the session with a larger chunk or total"
                )

    @property
    def rows(self) -> np.ndarray:
        """Rows held [B] once the pending plan is executed; of the first window where no layer evicts."""
        if not self.evicts:
            return self._now["window_length_0"].array.copy()
        keep, length = self._now["keep"].array, self._now["length"].array
        return np.where(keep >= 0, keep, length)

    @property
    def counters(self) -> Counters:
        """A snapshot of the counters; planned evictions count as done."""
        return Counters(
            self.batch,
            self._layers,
            self.capacity,
            self._kv_bytes,
            self._tokens.tolist(),
            self.rows.tolist(),
            self._total_evicted.tolist(),
            self._rounds.tolist(),
        )

    def step(self, input_ids: np.ndarray, count: np.ndarray, logits_at: np.ndarray, next_tokens: int = 1) -> np.ndarray:
        """Feed up to S tokens a sequence and return logits [B,N,V] float32.

        The returned array is overwritten by the next step with the same N.
        input_ids [B,S] int64, right-padded; count [B]: valid tokens of each; logits_at [B,N] int64: token indices whose
        logits are wanted; next_tokens: S of the step after this one, for which room is made.
        """
        start = self.rows
        tokens = input_ids.shape[1]
        self._check_windows(tokens)
        if self.evicts and (start + tokens > self.capacity).any():
            raise EngineError(
                f"a step of {tokens} tokens does not fit: {int(start.max())} rows are held and the capacity is "
                f"{self.capacity}; feed at most {self.capacity - int(start.max())} tokens a step"
            )
        count = np.asarray(count, np.int32)
        length = start + count
        limit = np.full(self.batch, self.capacity + 1, np.int32)
        if not self.dense:
            limit = np.minimum(self._budget + self._interval, self.capacity + 1)
            crowded = (length + next_tokens > self.capacity) & (length > self._budget)
            limit = np.where(crowded, np.minimum(limit, length), limit).astype(np.int32)
        binding = self._binding
        binding.feed("input_ids", np.ascontiguousarray(input_ids, np.int64))
        binding.feed("logits_at", np.ascontiguousarray(logits_at, np.int64))
        binding.feed("count", count)
        binding.feed("position", self.position)
        if self.evicts:
            binding.feed("limit", limit)
        for name in self._now:
            binding.input(name, self._now[name])
            binding.output(f"{name}_next", self._next[name])
        logits = self._logits_buffer(logits_at.shape[1])
        binding.output("logits", logits)
        binding.run()
        self._now, self._next = self._next, self._now
        evicted = self._evicted.array
        self.position = self.position + count
        self._tokens += count
        self._total_evicted += evicted
        self._rounds += evicted > 0
        return logits.array

    def _logits_buffer(self, wanted: int) -> Buffer:
        """[B,N,V] float32, kept from step to step while N stays the same."""
        if self._logits is None or self._logits[0] != wanted:
            self._logits = (wanted, self._binding.zeros((self.batch, wanted, self._vocab_size), "float32"))
        return self._logits[1]

    def close(self) -> None:
        """Release the buffers."""
        self._caches.clear()
        self._binding.close()
