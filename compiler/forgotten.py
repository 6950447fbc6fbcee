"""The global eviction ratio: the share of the tokens read that no KV head holds any more.

Accuracy falls off a cliff where it nears 1, whatever each head's own share is (arXiv 2603.01426).
"""

from collections.abc import Iterable

import numpy as np


def forgotten_share(held: Iterable[tuple[np.ndarray, np.ndarray]], tokens: np.ndarray) -> list[float]:
    """Of each sequence; held: the absolute positions [L*B,Hkv,C,1] of every plan's rows and the rows held [B].

    tokens [B]: how many were read.
    """
    seen = [np.zeros(int(count), bool) for count in tokens]
    for positions, lengths in held:
        batch = len(lengths)
        by_layer = positions.reshape(-1, batch, positions.shape[1], positions.shape[2])
        for sequence, length in enumerate(lengths):
            seen[sequence][by_layer[:, sequence, :, : int(length)].astype(np.int64).ravel()] = True
    return [1 - float(each.mean()) if len(each) else 0.0 for each in seen]
