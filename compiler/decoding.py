"""The loop around a session: prompts in chunks, then a token a step, drawn on the host."""

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np

from keysieve.compiler.sampling import Sampler, Sampling

# Yields the token drawn for every sequence, and takes which of them [B] go on.
Tokens = Generator[list[int], np.ndarray, None]


class Feedable(Protocol):
    """What prefill needs of a session."""

    whole_chunks: bool  # whether steps of one size are worth some padding

    def feed(self, input_ids: np.ndarray, count: np.ndarray, logits_at: np.ndarray, next_tokens: int = 1) -> Any:
        """A step whose logits [B,N,V] stay where the runtime has them."""


def prefill(session: Feedable, prompts: Sequence[Sequence[int]], chunk: int) -> Any:
    """Feed prompts of unequal lengths in chunks; returns the logits [B,V] after each one's last token.

    Prompts are aligned at their ends: the longest starts, each has at most one partial chunk (its first), and all end
    in the same step. A sequence that has not started yet takes part with count 0.
    """
    longest = max(len(prompt) for prompt in prompts)
    first = (longest - 1) % chunk + 1
    ends = list(range(first, longest + 1, chunk))
    logits, begin = None, 0
    for end, following in zip(ends, [*ends[1:], ends[-1] + 1], strict=True):
        size = chunk if session.whole_chunks and longest > chunk else end - begin
        tokens = np.zeros((len(prompts), size), np.int64)
        count = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[max(0, begin - longest + len(prompt)) : max(0, end - longest + len(prompt))]
            count[row] = len(part)
            tokens[row, : len(part)] = part
        logits = session.feed(tokens, count, np.maximum(count - 1, 0)[:, None], following - end)
        begin = end
    return logits[:, 0]  # type: ignore[index]


def decode(
    session: Feedable, prompts: Sequence[Sequence[int]], chunk: int, sampling: Sampling, stops: set[int]
) -> Tokens:
    """Read the prompts, then feed every sequence that goes on the token that was drawn for it.

    A sequence whose token is one of `stops` takes no further part.
    """
    sampler, index = Sampler(sampling, len(prompts)), np.zeros((len(prompts), 1), np.int64)
    drawn = sampler(prefill(session, prompts, chunk))
    while True:
        going = yield drawn
        going = going & [token not in stops for token in drawn]
        drawn = sampler(session.feed(np.where(going, drawn, 0)[:, None], going.astype(np.int32), index)[:, 0])
