"""The reference of attention over the rows that a token sees, against a naive loop."""

import math

import pytest
import torch

from keysieve.kernels.reference import attend_rows


def naive(query, key, value, first, last, scale, softcap, sinks):
    """One token of one head at a time, in float64."""
    batch, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, tokens, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            for s in range(tokens):
                since = 0 if first is None else max(int(first[b, s]), 0)
                rows = range(since, min(int(last[b, s]) + 1, key.shape[2]))
                logits = [float(query[b, head, s].double() @ key[b, head // group, n].double()) * scale for n in rows]
                if softcap:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                weights = [math.exp(x) for x in logits]
                total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[head])))
                for n, weight in zip(rows, weights, strict=True):
                    out[b, head, s] += weight / total * value[b, head // group, n].double()
    return out


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
def test_against_a_loop(softcap, with_sinks, windowed):
    query, key, value = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 5)
    last = torch.tensor([[4, 5, 6], [-1, 0, 10]])  # the second sequence's first token sees no row
    first = torch.tensor([[-2, 3, 6], [0, 0, 8]]) if windowed else None
    sinks = torch.randn(6) if with_sinks else None
    found = attend_rows(query, key, value, first, last, 0.4, softcap, sinks)
    assert torch.allclose(found.double(), naive(query, key, value, first, last, 0.4, softcap, sinks), atol=1e-6)
    assert (found[1, :, 0] == 0).all()


def test_it_lies_in_memory_as_the_output_projection_reads_it():
    found = attend_rows(torch.randn(2, 4, 3, 8), *torch.randn(2, 2, 2, 7, 8), None, torch.tensor([[3, 4, 5]] * 2), 1.0)
    assert found.shape == (2, 4, 3, 8)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_a_window_that_is_past_the_last_row_sees_nothing(integers):
    first, last = (torch.tensor([[row]], dtype=integers) for row in (5, 4))
    found = attend_rows(torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 1, 7, 8), first, last, 1.0, 0.0, torch.zeros(2))
    assert (found == 0).all()
