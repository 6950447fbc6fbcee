"""How many rows the caches of a session hold, step by step, and at how many the engine is to plan an eviction.

What an engine evicts follows from lengths, limits and budgets alone. So a session knows it without asking the engine,
which may still be computing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keysieve.compiler.config import MOST_BUDGET
from keysieve.compiler.head_classes import class_budgets
from keysieve.errors import EngineError
from keysieve.plugins.contract import ROW_STATES

MOST_ROWS = (1 << 31) - 1  # lengths and limits are int32


def one_a_sequence(budget: int | Sequence[int], batch: int) -> np.ndarray:
    """A budget for all, or one a sequence, as [B] int32. Raises EngineError for any other number of them."""
    given = np.atleast_1d(np.asarray(budget))
    if given.dtype.kind not in "iu":
        raise EngineError(f"budget {budget!r} is no whole number of rows; give an int, or one for each prompt")
    if (given > MOST_BUDGET).any():
        raise EngineError(f"budget {int(given.max()):,} is beyond {MOST_BUDGET:,} rows; give a smaller one")
    given = given.astype(np.int32)
    if given.ndim != 1 or len(given) not in (1, batch):
        raise EngineError(f"{given.size} budgets were given for {batch} prompts; give one for all, or one each")
    return np.broadcast_to(given, (batch,)).copy()


def window_rows(size: int, room: int, total: int | None = None) -> int:
    """Rows of a cache for a window of `size` tokens: the past that the next token sees, and room for new ones."""
    rows = size - 1 + room
    return min(rows, total) if total else rows


class Rows:
    """The rows of `batch` sequences in caches of `capacity` rows.

    manifest: the bundle's. budget: rows kept by an eviction, one for all or one a sequence; None never evicts. chunk:
    the most tokens of a step, for which caches of sliding windows get room (None: the interval). total: the longest
    text, which a window need not exceed (None: not known). Raises EngineError for sizes that leave nothing to choose.

    Budget and capacity are those of a KV head on average. Every class of heads (K of them) has its own: budgets [K,B],
    capacities [K], and `held` [K,B], the rows held once the pending plan is executed. suffixes [K] end the names of a
    class's inputs and outputs.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        batch: int,
        capacity: int,
        budget: int | Sequence[int] | None,
        chunk: int | None,
        total: int | None,
    ):
        if not 0 < capacity < MOST_ROWS:
            raise EngineError(f"capacity is {capacity}; a cache has 1 to {MOST_ROWS - 1:,} rows")
        eviction, classes = manifest["eviction"], manifest["classes"]
        self.batch, self.capacity, self.dense = batch, capacity, budget is None
        self.evicts = bool(classes)  # else all layers have windows
        self.interval = int(eviction["interval"])
        self.suffixes = [str(each["suffix"]) for each in classes]
        self._heads = np.array([each["kv_heads"] for each in classes])
        states = {state["name"]: self.suffixes[state["class"]] for state in manifest["row_states"]}
        # What ends the names of the class whose rows' tokens a state holds, by the name of that state.
        self.token_states = {name: end for name, end in states.items() if name.startswith(ROW_STATES[1])}
        average = np.full(batch, capacity, np.int32) if budget is None else one_a_sequence(budget, batch)
        self._check_budget(eviction, average)
        room = max(self.interval, chunk or 0)
        if self.dense:
            self.budgets = np.broadcast_to(average, (len(classes), batch))
            self.capacities = [capacity] * len(classes)
        else:
            self.budgets = class_budgets(classes, average, eviction["sinks"] + eviction["recent"])
            self.capacities = self._of_classes(capacity, int(average.max()), room, total)
        self.held = np.zeros((len(classes), batch), np.int64)
        self._window_sizes = [int(window["size"]) for window in manifest["windows"]]
        self.window_rows = [window_rows(size, room, total) for size in self._window_sizes]
        self.window_held = [np.zeros(batch, np.int64) for _ in self._window_sizes]

    def _of_classes(self, capacity: int, budget: int, room: int, total: int | None) -> list[int]:
        """Capacities of the classes: as much beyond their budgets as `capacity` is beyond the average one."""
        if len(self.suffixes) == 1:
            return [capacity]
        beyond = capacity - budget if capacity > budget else room
        return [min(int(rows.max()) + beyond, total or MOST_ROWS - 1) for rows in self.budgets]

    def sizes(self) -> dict[str, int]:
        """How many rows the caches of each kind have, by the name of that size in a graph."""
        evicting = {f"capacity{end}": rows for end, rows in zip(self.suffixes, self.capacities, strict=True)}
        return evicting | {f"window_{index}": rows for index, rows in enumerate(self.window_rows)}

    def of_cache(self, cache: dict[str, Any]) -> int:
        """Rows to allocate for one of the manifest's caches."""
        return self.capacities[cache["class"]] if cache["window"] is None else self.window_rows[cache["window"]]

    @property
    def heads(self) -> int:
        """KV heads of all layers that evict."""
        return int(self._heads.sum())

    def average(self, of_classes: np.ndarray) -> np.ndarray:
        """[K,B] rows of the heads of each class -> [B] int64: of a head on average, rounded."""
        total = self._heads @ of_classes
        return np.asarray((total + self.heads // 2) // self.heads, np.int64)

    def limit(self, tokens: int, count: np.ndarray, next_tokens: int) -> np.ndarray:
        """[K,B] int32: the rows at which a step of `tokens` tokens, `count` [B] of them valid, is to plan an eviction.

        next_tokens: how many tokens the step after it takes, for which room is made. Raises EngineError where the
        tokens do not fit.
        """
        self._check_windows(tokens)
        capacities = np.array(self.capacities, np.int64)[:, None]
        room = (capacities - self.held).min(initial=MOST_ROWS)
        if tokens > room:
            raise EngineError(
                f"a step of {tokens} tokens does not fit: {int(self.held.max())} rows are held and the capacity is "
                f"{max(self.capacities)}; feed at most {room} tokens a step"
            )
        if self.dense:
            return np.broadcast_to(capacities + 1, self.held.shape).astype(np.int32)
        length = self.held + count
        limit = np.minimum(self.budgets + self.interval, capacities + 1)
        crowded = (length + next_tokens > capacities) & (length > self.budgets)
        limit = np.where(crowded, np.minimum(limit, length), limit)
        # All classes evict in the same steps: what a round needs beside the rows is then computed once for them.
        due = (length >= limit).any(axis=0) & (length > self.budgets)
        return np.where(due, np.minimum(limit, length), limit).astype(np.int32)

    def advance(self, tokens: int, count: np.ndarray, limit: np.ndarray) -> None:
        """A step was taken, with what `limit` returned for it."""
        length = self.held + count
        self.held = np.where(length >= limit, np.minimum(self.budgets, length), length)
        for index, (size, rows) in enumerate(zip(self._window_sizes, self.window_rows, strict=True)):
            held = self.window_held[index]
            trimmed = (held + tokens > rows) & (held > size - 1)
            self.window_held[index] = np.where(trimmed, size - 1, held) + count

    def _check_budget(self, eviction: dict[str, Any], budget: np.ndarray) -> None:
        protected = eviction["sinks"] + eviction["recent"]
        if not self.dense and (budget <= protected).any():
            raise EngineError(
                f"budget {int(budget.min())} leaves no row to choose: the engine always keeps "
                f"{eviction['sinks']} sinks and {eviction['recent']} recent rows; give a budget above {protected}"
            )

    def _check_windows(self, tokens: int) -> None:
        for size, rows, held in zip(self._window_sizes, self.window_rows, self.window_held, strict=True):
            if (np.minimum(held, size - 1) + tokens > rows).any():
                raise EngineError(
                    f"a step of {tokens} tokens does not fit: caches of the {size}-token window have {rows} rows; feed "
                    f"at most {rows - size + 1} tokens a step, or make the session with a larger chunk or total"
                )
