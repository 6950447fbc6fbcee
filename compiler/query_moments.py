"""Streaming sums of a layer's queries, of which its statistics are the means."""

from typing import TYPE_CHECKING

import numpy as np

from keysieve.compiler.statistics import LayerStatistics
from keysieve.errors import StatisticsError
from keysieve.passes.rope_form import RopeForm

if TYPE_CHECKING:
    from torch import Tensor


class QueryMoments:
    """Streaming float64 sums of one layer's queries and of their band magnitudes."""

    def __init__(self, rope: RopeForm, heads: int, layer: int = 0) -> None:
        """Start from nothing, for `heads` query heads of attention layer number `layer`."""
        self.rope = rope
        self.layer = layer
        self.tokens = 0
        self.q_sum = np.zeros((heads, rope.head_dim))
        self.abs_sum = np.zeros((heads, rope.rotary_dim // 2))

    @classmethod
    def resume(cls, statistics: LayerStatistics, tokens: int) -> "QueryMoments":
        """Go on from finished statistics over `tokens` tokens."""
        moments = cls(statistics.rope, statistics.q_mean.shape[0], statistics.layer)
        moments.tokens = tokens
        moments.q_sum = statistics.q_mean * tokens
        moments.abs_sum = statistics.q_abs * tokens
        return moments

    def add(self, q: "Tensor", mask: "Tensor | None" = None) -> None:
        """Add the queries q [B, Hq, N, D], before RoPE; mask [B, N] is true (or 1) where a token counts.

        Raises StatisticsError if q or mask has another shape.
        """
        heads, head_dim = self.q_sum.shape
        if q.ndim != 4 or q.shape[1] != heads or q.shape[3] != head_dim:
            raise StatisticsError(
                f"layer {self.layer}: queries have shape {list(q.shape)} instead of [B, {heads}, N, {head_dim}]"
            )
        by_token = q.detach().cpu().double().numpy().transpose(0, 2, 1, 3)  # [B, N, Hq, D]
        if mask is not None:
            if mask.shape != by_token.shape[:2]:
                raise StatisticsError(
                    f"layer {self.layer}: mask has shape {list(mask.shape)} instead of {list(by_token.shape[:2])}"
                )
            by_token = by_token[mask.detach().cpu().numpy().astype(bool)]
        by_token = by_token.reshape(-1, heads, head_dim)
        real, imaginary = self.rope.pairs
        self.q_sum += by_token.sum(axis=0)
        self.abs_sum += np.hypot(by_token[..., real], by_token[..., imaginary]).sum(axis=0)
        self.tokens += len(by_token)

    def merge(self, other: "QueryMoments") -> None:
        """Add the sums of the same layer over other tokens."""
        self.q_sum += other.q_sum
        self.abs_sum += other.abs_sum
        self.tokens += other.tokens

    def finish(self) -> LayerStatistics:
        """The means so far. Raises StatisticsError if no token was added, or if one was NaN or infinite."""
        if self.tokens == 0:
            raise StatisticsError(f"layer {self.layer}: no token was added; give a longer text")
        return LayerStatistics(self.layer, self.rope, self.q_sum / self.tokens, self.abs_sum / self.tokens)
