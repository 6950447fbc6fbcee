"""Classes of KV heads: which heads share a budget, and how a budget is divided among the classes.

A user gives one number, rows a KV head on average. A head's share says how many times that number it gets. Shares
depend on the number itself (at many rows every head has enough), so they are known at several budgets, and those in
between are interpolated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keysieve.errors import ConfigError

CHOICE = 32  # rows that the narrowest class may choose beyond those that are always kept, where the budget allows it


@dataclass(frozen=True)
class HeadClasses:
    """of_heads [L,Hkv or fewer]: the class of every KV head of each layer that evicts, the narrowest 0.

    budgets: rows a KV head on average at which shares are known, ascending; shares [K, budgets]: rows of a head of each
    class, as a share of that average.
    """

    of_heads: list[list[int]]
    budgets: list[int]
    shares: list[list[float]]

    def entries(self) -> list[dict[str, Any]]:
        """What a manifest says of each class."""
        every = [each for layer in self.of_heads for each in layer]
        suffixes = [f"_{index}" if len(self.shares) > 1 else "" for index in range(len(self.shares))]
        return [
            {"suffix": suffix, "kv_heads": every.count(index), "budgets": self.budgets, "shares": shares}
            for index, (suffix, shares) in enumerate(zip(suffixes, self.shares, strict=True))
        ]


def uniform(kv_heads: Sequence[int]) -> HeadClasses:
    """One class for all heads; kv_heads: of every layer that evicts."""
    return HeadClasses([[0] * heads for heads in kv_heads], [1], [[1.0]] if kv_heads else [])


def classify(
    shares: Sequence[np.ndarray], budgets: Sequence[int], budget: int, most: int, protected: int
) -> HeadClasses:
    """At most `most` classes of heads whose shares at `budget` are alike.

    shares: [budgets, Hkv] of every layer. Classes are those that leave the least squared difference of the heads' rows
    to their class's; heads that get no more than the least that class_budgets gives are alike. protected: as there.
    Raises ConfigError for less than one class.
    """
    if most < 1:
        raise ConfigError(f"head classes are {most}; there is at least one")
    table = np.concatenate([np.asarray(layer, np.float64) for layer in shares], axis=1)
    table = table / table.mean(axis=1, keepdims=True)
    wanted = np.array([np.interp(budget, budgets, column) for column in table.T])
    wanted = np.maximum(wanted, min(budget, protected + CHOICE) / budget)
    numbers = _segments(np.sort(wanted), most)
    of_head = np.searchsorted(np.unique(np.sort(wanted)[numbers]), wanted, side="right") - 1
    means = [[float(row[of_head == each].mean()) for row in table] for each in range(of_head.max() + 1)]
    ends = np.cumsum([layer.shape[1] for layer in shares])[:-1]
    return HeadClasses([part.tolist() for part in np.split(of_head, ends)], list(map(int, budgets)), means)


def class_budgets(classes: Sequence[dict[str, Any]], budget: np.ndarray, protected: int) -> np.ndarray:
    """[K,B] int32: rows of a head of each class, for an average of `budget` [B].

    classes: the manifest's. protected: rows that are always kept. No class gets less than these and CHOICE more, or
    the average where that is less; what the narrow ones get beyond their share the others give.
    """
    if not classes:
        return np.zeros((0, len(budget)), np.int32)
    heads = np.array([each["kv_heads"] for each in classes], np.float64)
    result = []
    for average in budget.astype(np.float64):
        shares = np.array([np.interp(average, each["budgets"], each["shares"]) for each in classes])
        shares = shares / (shares @ heads) * heads.sum()
        least = min(average, protected + CHOICE)
        result.append(_whole(_at_least(shares * average, heads, least), heads, average))
    return np.array(result, np.int32).T


def _at_least(rows: np.ndarray, heads: np.ndarray, least: float) -> np.ndarray:
    """Rows of every class, of which none has less than `least`, with the same total."""
    total, narrow = rows @ heads, rows < least
    while narrow.any():
        rest = total - least * heads[narrow].sum()
        wide = rows[~narrow] @ heads[~narrow]
        raised = np.where(narrow, least, rows * (rest / wide if wide else 0.0))
        if not (raised[~narrow] < least).any():
            return raised
        narrow |= raised < least
    return rows


def _whole(rows: np.ndarray, heads: np.ndarray, average: float) -> np.ndarray:
    """Whole rows; what rounding down leaves goes to the widest classes that can take it."""
    whole = np.floor(rows + 1e-6)
    left = round(average * heads.sum() - whole @ heads)
    for index in np.argsort(-rows):
        more = left // heads[index]
        whole[index] += more
        left -= more * heads[index]
    return whole


def _segments(values: np.ndarray, most: int) -> np.ndarray:
    """Where each of at most `most` runs of sorted values starts, so that the squares within the runs are least."""
    count = len(values)
    most = min(most, len(np.unique(values)))
    sums, squares = (np.concatenate([[0.0], np.cumsum(values**power)]) for power in (1, 2))

    def inside(start: np.ndarray, end: int) -> np.ndarray:
        return squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)

    cost = np.full((most + 1, count + 1), np.inf)
    start_of = np.zeros((most + 1, count + 1), int)
    cost[0, 0] = 0.0
    for run in range(1, most + 1):
        for end in range(run, count + 1):
            starts = np.arange(run - 1, end)
            totals = cost[run - 1, starts] + inside(starts, end)
            best = int(totals.argmin())
            cost[run, end], start_of[run, end] = totals[best], starts[best]
    found, end = [], count
    for run in range(most, 0, -1):
        end = int(start_of[run, end])
        found.append(end)
    return np.array(found[::-1])
