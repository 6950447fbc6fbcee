"""Statistics with shares of heads that a test chooses, for models that learned none."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from keysieve.compiler import statistics_file
from keysieve.compiler.statistics import Learned, Statistics


def with_shares(statistics: Statistics, shares: Sequence[Sequence[float]], budgets: Sequence[int]) -> Statistics:
    """Shares of every layer's KV heads, the same at all budgets."""
    layers = [
        replace(layer, share=np.tile(np.array(of_heads, np.float32), (len(budgets), 1)))
        for layer, of_heads in zip(statistics.layers, shares, strict=True)
    ]
    learned = Learned(0, 1, 0, 0, 16, 64, list(budgets), done=1)
    return replace(statistics, layers=layers, learned=learned)


def random_shares(layers: int, kv_heads: int) -> list[list[float]]:
    """Few heads get much more than most."""
    return (0.5 + 2 * np.random.default_rng(1).random((layers, kv_heads)) ** 3).tolist()


def save_shares(file: Path, output: Path, shares: Sequence[Sequence[float]], budgets: Sequence[int]) -> Path:
    """A copy of a statistics file, with those shares."""
    statistics_file.save(with_shares(statistics_file.load(file), shares, budgets), output)
    return output
