"""Masks as models write them, and masks that are none of a decoder's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from keysieve.passes.find_attention import find_attention
from keysieve.passes.mask_span import Span, mask_span
from support.graphs import ToyDecoder, graph_of

Mask = Callable[[Tensor, Tensor], Tensor]
"""mask(input_ids [B,S], position_ids [B,S]) -> what a token sees, or what is added to its logits."""


def indices(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Index of query [S,1] and key [S]."""
    rows = torch.arange(tokens.shape[1])
    return rows[:, None], rows


def sliding(size: int) -> Mask:
    def mask(tokens: Tensor, positions: Tensor) -> Tensor:
        query, key = indices(tokens)
        return ((key <= query) & (key > query - size)).expand(tokens.shape[0], 1, -1, -1)

    return mask


def chunked(size: int) -> Mask:
    def mask(tokens: Tensor, positions: Tensor) -> Tensor:
        query, key = positions[:, None, :, None], positions[:, None, None, :]
        return (key <= query) & (key // size == query // size)

    return mask


def added(tokens: Tensor, positions: Tensor) -> Tensor:
    query, key = indices(tokens)
    return torch.where(key <= query, 0.0, torch.finfo(torch.float32).min)[None, None]


def buffer(tokens: Tensor, positions: Tensor) -> Tensor:
    """A table from before index arithmetic: it can only be evaluated as a whole."""
    return torch.ones(64, 64, dtype=torch.bool).tril()[: tokens.shape[1], : tokens.shape[1]][None, None]


def from_one(tokens: Tensor, positions: Tensor) -> Tensor:
    """Indices of keys count from 1."""
    query, key = torch.arange(tokens.shape[1])[:, None], torch.arange(1, tokens.shape[1] + 1)
    return ((key <= query + 1) & (key > query - 8))[None, None]


class Masked(ToyDecoder):
    def __init__(self, mask: Mask, **options: float):
        super().__init__(lambda query, key, positions: (query, key), **options)
        self.made = mask

    def mask(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.made(input_ids, position_ids)


def span_of(mask: Mask) -> Span | str:
    graph = graph_of(Masked(mask))
    (node,) = graph.calls(torch.ops.keysieve.attention.default)
    return mask_span(graph, node.args[4])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda tokens, positions: (indices(tokens)[1] <= indices(tokens)[0])[None, None], Span()),
        (added, Span()),
        (buffer, Span()),
        (sliding(7), Span(window=7)),
        (sliding(100_000), Span(window=100_000)),
        (from_one, Span(window=9)),
        (chunked(64), Span(chunk=64)),
        (chunked(8192), Span(chunk=8192)),
    ],
)
def test_what_a_mask_lets_a_token_see(mask: Mask, expected: Span) -> None:
    assert span_of(mask) == expected


def both_ways(tokens: Tensor, positions: Tensor) -> Tensor:
    query, key = indices(tokens)
    return ((key - query).abs() < 9)[None, None]


def prefix(tokens: Tensor, positions: Tensor) -> Tensor:
    query, key = indices(tokens)
    return ((key <= query) | (key < 16))[None, None]


def dilated(tokens: Tensor, positions: Tensor) -> Tensor:
    query, key = indices(tokens)
    return ((key <= query) & ((query - key) % 2 == 0))[None, None]


def by_head(tokens: Tensor, positions: Tensor) -> Tensor:
    query, key = indices(tokens)
    return ((key <= query) & (query - key < torch.tensor([4, 8, 16, 32])[:, None, None]))[None]


def of_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    query, key = indices(tokens)
    return (key <= query) & (tokens != 0)[:, None, None, :]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (both_ways, "neither causal nor a causal sliding window or chunk"),
        (prefix, "neither causal nor a causal sliding window or chunk"),
        (dilated, "neither causal nor a causal sliding window or chunk"),
        (by_head, "differs from head to head"),
        (of_tokens, "depends on the tokens"),
    ],
)
def test_other_masks_are_refused_with_the_reason(mask: Mask, reason: str) -> None:
    found = span_of(mask)
    assert isinstance(found, str) and reason in found


def test_attention_takes_the_span_in_place_of_the_mask() -> None:
    graph = graph_of(Masked(sliding(7)))
    (attention,) = find_attention(graph).matches
    assert (attention.window, attention.node.args[4], attention.node.args[6]) == (7, None, 7)


def test_attention_with_a_mask_that_is_none_is_a_miss() -> None:
    found = find_attention(graph_of(Masked(both_ways)))
    assert not found.matches and "neither causal" in found.misses[0].reason
