"""Linear attention against its matrix form, and what padding and splitting must not change."""

import pytest
import torch

from keysieve.kernels.reference import linear_attention

BATCH, HEADS, TOKENS, KEY, VALUE = 2, 3, 7, 4, 5


def inputs(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value, decay, rate, state = (
        torch.randn(BATCH, HEADS, *shape, generator=generator)
        for shape in ((TOKENS, KEY), (TOKENS, KEY), (TOKENS, VALUE), (TOKENS,), (TOKENS,), (KEY, VALUE))
    )
    key = key / key.norm(dim=-1, keepdim=True)
    return [query, key, value, -decay.abs(), rate.sigmoid(), state]


@pytest.mark.parametrize("delta", [True, False])
def test_a_token_writes_its_value_at_its_key(delta: bool) -> None:
    """S <- (I - b k k^T) e^g S + b k v^T with the delta rule, e^g S + b k v^T without; q reads S^T q."""
    query, key, value, decay, rate, state = inputs()
    read, last = linear_attention(query, key, value, decay, rate, state, delta)
    for b in range(BATCH):
        for h in range(HEADS):
            matrix = state[b, h].double()
            for n in range(TOKENS):
                k, v = key[b, h, n].double(), value[b, h, n].double()
                step = torch.eye(KEY, dtype=torch.float64) - delta * rate[b, h, n] * torch.outer(k, k)
                matrix = step @ (matrix * decay[b, h, n].exp()) + rate[b, h, n] * torch.outer(k, v)
                torch.testing.assert_close(read[b, h, n].double(), query[b, h, n].double() @ matrix, rtol=0, atol=1e-5)
            torch.testing.assert_close(last[b, h].double(), matrix, rtol=0, atol=1e-5)


def test_steps_of_any_size_are_one() -> None:
    *tensors, state = inputs()
    whole, last = linear_attention(*tensors, state, True)
    parts = []
    for begin, end in ((0, 1), (1, 5), (5, TOKENS)):
        read, state = linear_attention(*(tensor[:, :, begin:end] for tensor in tensors), state, True)
        parts.append(read)
    assert torch.equal(torch.cat(parts, 2), whole) and torch.equal(state, last)


def test_a_token_without_decay_and_rate_changes_nothing() -> None:
    query, key, value, decay, rate, state = inputs()
    _, last = linear_attention(query, key, value, decay * 0, rate * 0, state, True)
    assert torch.equal(last, state)
