"""A session: the state of one batch of sequences on a loaded engine, and the step that advances it.

The engine itself decides when and what to evict. A session only feeds tokens, binds each cache's input and output to
one buffer (so nothing grows and nothing is copied), and carries the plan of one step into the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keysieve.compiler.decoding import Tokens, decode
from keysieve.compiler.holders import count_holders, forgotten_share
from keysieve.compiler.rows import Rows
from keysieve.compiler.runtimes import Binding, Buffer
from keysieve.compiler.sampling import Sampling


@dataclass
class Counters:
    """What a session has done. Rows are per sequence, and those of a KV head of the layers that evict, on average.

    layers: those that evict; capacity: rows of their caches; kv_bytes: allocated bytes of all caches, those of sliding
    windows included; rounds: evictions executed or planned, summed over sequences. holders: of every sequence, how many
    of the `heads` KV heads of these layers hold each token that was read, for engines that keep which tokens their rows
    are of (else empty).
    """

    batch: int
    layers: int
    capacity: int
    kv_bytes: int
    tokens: list[int] = field(default_factory=list)
    rows_held: list[int] = field(default_factory=list)
    rows_evicted: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    holders: list[list[int]] = field(default_factory=list, repr=False)
    heads: int = 0

    @property
    def forgotten(self) -> list[float]:
        """The share of the tokens read that no KV head holds any more; empty without holders."""
        return [forgotten_share(each) for each in self.holders]


class Session:
    """State of `batch` sequences: caches of `capacity` rows, lengths, positions and the pending plan.

    budget: rows kept by an eviction, one for all or one a sequence; None never evicts (the dense engine).
    pinned: rows from the start that are never evicted, one a sequence (a pinned prompt).
    chunk: the most tokens of a step, for which caches of sliding windows get room (None: the interval).
    total: the longest text, which a window need not exceed (None: not known).
    """

    def __init__(
        self,
        binding: Binding,
        manifest: dict[str, Any],
        batch: int,
        capacity: int,
        budget: int | Sequence[int] | None,
        pinned: Sequence[int] | None = None,
        initial: dict[str, np.ndarray] | None = None,
        chunk: int | None = None,
        total: int | None = None,
    ):
        self._rows = Rows(manifest, batch, capacity, budget, chunk, total)
        self.batch, self.capacity = batch, capacity
        self.evicts = self._rows.evicts
        self._binding = binding
        self._caches: dict[str, Buffer] = {}
        for cache in manifest["caches"]:
            for name, width in (("key", cache["head_dim"]), ("value", cache["value_dim"])):
                shape = (batch, cache["kv_heads"], self._rows.of_cache(cache), width)
                self._caches[f"{name}_{cache['name']}"] = binding.zeros(shape, manifest["kv_dtype"])
        for state in manifest["row_states"]:
            shape = (state["layers"] * batch, state["kv_heads"], self._rows.capacities[state["class"]], 1)
            self._caches[state["name"]] = binding.zeros(shape, "float32")
        start = {f"window_length_{index}": np.zeros(batch, np.int32) for index in range(len(manifest["windows"]))}
        for state in manifest["states"]:
            start[state["name"]] = np.zeros((batch, *state["shape"]), np.float32)
        for suffix in self._rows.suffixes:
            start[f"length{suffix}"] = np.zeros(batch, np.int32)
            start[f"keep{suffix}"] = np.full(batch, -1, np.int32)
        for name, plan in manifest["plans"].items():
            rows = self._rows.capacities[plan["class"]]
            start[name] = np.zeros((plan["layers"], batch, plan["kv_heads"], rows), np.int32)
        for name, value in (initial or {}).items():  # [L, 1, ...] -> [L, B, ...]
            start[name] = np.ascontiguousarray(np.repeat(value.astype(np.float32), batch, axis=1))
        # State that is not updated in place alternates between two buffers.
        self._now = {name: binding.buffer(value) for name, value in start.items()}
        self._next = {name: binding.buffer(np.zeros_like(value)) for name, value in start.items()}
        self._evicted = {suffix: binding.zeros((batch,), "int32") for suffix in self._rows.suffixes}
        self._pinned = np.zeros(batch, np.int32) if pinned is None else np.asarray(pinned, np.int32)
        self.position = np.zeros(batch, np.int64)
        self._rounds = np.zeros(batch, np.int64)
        self._layers = manifest["sizes"]["layers"]
        self._kv_bytes = sum(buffer.nbytes for buffer in self._caches.values())
        self._vocab_size = int(manifest["vocab_size"])
        self._logits: tuple[int, Buffer] | None = None
        for name, buffer in self._caches.items():
            binding.input(name, buffer)
            binding.output(f"{name}_next", buffer)
        for (suffix, evicted), rows in zip(self._evicted.items(), self._rows.budgets, strict=True):
            binding.output(f"evicted{suffix}", evicted)
            binding.feed(f"budget{suffix}", np.ascontiguousarray(rows))
        if self.evicts:
            binding.feed("pinned", self._pinned)

    @property
    def rows(self) -> np.ndarray:
        """Rows held [B] once the pending plan is executed; of the first window where no layer evicts."""
        if not self.evicts:
            return self._now["window_length_0"].array.copy()
        return self._rows.average(self.rows_of_classes)

    @property
    def rows_of_classes(self) -> np.ndarray:
        """Rows held [K,B] by a KV head of each class, once the pending plan is executed."""
        suffixes = self._rows.suffixes
        keep, length = (np.stack([self._now[f"{name}{end}"].array for end in suffixes]) for name in ("keep", "length"))
        return np.where(keep >= 0, keep, length)

    @property
    def counters(self) -> Counters:
        """A snapshot of the counters; planned evictions count as done."""
        rows = self.rows  # an average that is rounded; what else was read is gone
        return Counters(
            self.batch,
            self._layers,
            self.capacity,
            self._kv_bytes,
            self.position.tolist(),
            rows.tolist(),
            (self.position - rows if self.evicts else np.zeros(self.batch, int)).tolist(),
            self._rounds.tolist(),
            self._holders(),
            self._rows.heads,
        )

    def _holders(self) -> list[list[int]]:
        states = self._rows.token_states.items()
        held = [(self._caches[name].array, self._now[f"length{end}"].array) for name, end in states]
        return count_holders(held, self.position) if held else []

    def step(self, input_ids: np.ndarray, count: np.ndarray, logits_at: np.ndarray, next_tokens: int = 1) -> np.ndarray:
        """Feed up to S tokens a sequence and return logits [B,N,V] float32.

        The returned array is overwritten by the next step with the same N.
        input_ids [B,S] int64, right-padded; count [B]: valid tokens of each; logits_at [B,N] int64: token indices whose
        logits are wanted; next_tokens: S of the step after this one, for which room is made.
        """
        tokens, count = input_ids.shape[1], np.asarray(count, np.int32)
        limit = self._rows.limit(tokens, count, next_tokens)
        binding = self._binding
        binding.feed("input_ids", np.ascontiguousarray(input_ids, np.int64))
        binding.feed("logits_at", np.ascontiguousarray(logits_at, np.int64))
        binding.feed("count", count)
        binding.feed("position", self.position)
        for suffix, rows in zip(self._rows.suffixes, limit, strict=True):
            binding.feed(f"limit{suffix}", rows)
        for name in self._now:
            binding.input(name, self._now[name])
            binding.output(f"{name}_next", self._next[name])
        logits = self._logits_buffer(logits_at.shape[1])
        binding.output("logits", logits)
        binding.run()
        self._rows.advance(tokens, count, limit)
        self._now, self._next = self._next, self._now
        self.position = self.position + count
        if self.evicts:
            evicted = np.stack([buffer.array for buffer in self._evicted.values()])
            self._rounds += (evicted > 0).any(axis=0)
        return logits.array

    feed = step  # a host's runtime leaves its logits here
    whole_chunks = False

    def decode(
        self, prompts: Sequence[Sequence[int]], chunk: int, sampling: Sampling, stops: set[int], most: int
    ) -> Tokens:
        """Read the prompts and draw at most `most` tokens a sequence; see keysieve.compiler.decoding.decode."""
        return decode(self, prompts, chunk, sampling, stops)

    def _logits_buffer(self, wanted: int) -> Buffer:
        """[B,N,V] float32, kept from step to step while N stays the same."""
        if self._logits is None or self._logits[0] != wanted:
            self._logits = (wanted, self._binding.zeros((self.batch, wanted, self._vocab_size), "float32"))
        return self._logits[1]

    def close(self) -> None:
        """Release the buffers."""
        self._caches.clear()
        self._binding.close()
