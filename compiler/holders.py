"""Which tokens the caches still hold, and the global eviction ratio: the share that no KV head holds any more.

Accuracy falls off a cliff where that ratio nears 1, whatever each head's own share is (arXiv 2603.01426).
"""

from collections.abc import Iterable, Sequence

import numpy as np


def count_holders(held: Iterable[tuple[np.ndarray, np.ndarray]], tokens: np.ndarray) -> list[list[int]]:
    """How many KV heads of all layers hold each token of each sequence.

    held: the absolute positions [L*B,Hkv,C,1] of every plan's rows, and the rows held [B]. tokens [B]: how many were
    read.
    """
    counts = [np.zeros(int(count), np.int64) for count in tokens]
    for positions, lengths in held:
        batch = len(lengths)
        by_layer = positions.reshape(-1, batch, positions.shape[1], positions.shape[2])
        for sequence, length in enumerate(lengths):
            rows = by_layer[:, sequence, :, : int(length)].astype(np.int64).ravel()
            counts[sequence] += np.bincount(rows, minlength=len(counts[sequence]))
    return [count.tolist() for count in counts]


def forgotten_share(holders: Sequence[int]) -> float:
    """The share of a sequence's tokens that no head holds; 0 before the first."""
    return sum(count == 0 for count in holders) / len(holders) if len(holders) else 0.0
