"""Choosing the next token from logits: greedy, or temperature with top-k and top-p."""

from dataclasses import dataclass

import numpy as np

from keysieve.errors import ConfigError

FIRST_SORTED = 256


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token; the same seed gives the same tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} must be finite and at least 0; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must lie in (0, 1]")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative; give 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} is negative; 0 keeps every token")


class Sampler:
    """Draws tokens for a batch; every sequence has its own random stream, so a batch draws what solo runs draw."""

    def __init__(self, sampling: Sampling, batch: int):
        self._sampling = sampling
        self._streams = [np.random.default_rng(sampling.seed) for _ in range(batch)]

    def __call__(self, logits: np.ndarray) -> list[int]:
        """logits [B,V] -> one token a sequence."""
        if self._sampling.temperature == 0:
            return [int(token) for token in logits.argmax(-1)]
        return [self._draw(row, stream) for row, stream in zip(logits, self._streams, strict=True)]

    def _draw(self, logits: np.ndarray, stream: "np.random.Generator") -> int:
        options = self._sampling
        scaled = logits.astype(np.float64) / options.temperature
        candidates = np.arange(len(scaled))
        if options.top_k and options.top_k < len(scaled):
            candidates = _highest(scaled, options.top_k)[: options.top_k]
        chances = np.exp(scaled[candidates] - scaled[candidates].max())
        chances /= chances.sum()
        if options.top_p < 1:
            kept = _likeliest(chances, options.top_p)
            candidates, chances = candidates[kept], chances[kept] / chances[kept].sum()
        return int(stream.choice(candidates, p=chances))


def _highest(values: np.ndarray, size: int) -> np.ndarray:
    """Indices of the `size` highest values or more, the highest first, and equal ones in the order of their indices."""
    top = np.arange(len(values))
    if size < len(values):
        top = np.flatnonzero(values >= np.partition(values, -size)[-size])
    return top[np.argsort(-values[top], kind="stable")]


def _likeliest(chances: np.ndarray, mass: float) -> np.ndarray:
    """Indices of the smallest set whose mass is reached, the likeliest first; its last member is the first to reach it.

    Sorts as many as are needed, which mostly are few of a vocabulary.
    """
    size = FIRST_SORTED
    while True:
        order = _highest(chances, size)
        reached = np.cumsum(chances[order])
        if reached[-1] >= mass or size >= len(chances):
            return order[: int(np.searchsorted(reached, mass)) + 1]
        size *= 8
