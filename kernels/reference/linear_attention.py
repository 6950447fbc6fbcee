"""Linear attention token by token, with or without the delta rule: the specification."""

import torch
from torch import Tensor


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor, delta: bool
) -> tuple[Tensor, Tensor]:
    """Run S tokens through the state of every head.

    query, key [B, H, S, Dk], value [B, H, S, Dv]; decay [B, H, S] is the logarithm of what is kept of the state, rate
    [B, H, S] how much of the token is written; state [B, H, Dk, Dv] float32. delta: the value at the key moves to the
    new one by the rate (gated delta rule, arXiv 2412.06464); else the new one is added (Mamba-2's scan, arXiv
    2405.21060). A token with decay 0 and rate 0 leaves the state as it is.

    Returns what the queries read [B, H, S, Dv] and the state after the last token, both float32.
    """
    query, key, value, decay, rate = (tensor.float() for tensor in (query, key, value, decay, rate))
    results = []
    for token in range(query.shape[2]):
        at = key[:, :, token, :, None]
        state = state * decay[:, :, token, None, None].exp()
        new = value[:, :, token]
        if delta:
            new = new - (state * at).sum(2)
        state = state + at * (new * rate[:, :, token, None])[:, :, None]
        results.append((state * query[:, :, token, :, None]).sum(2))
    return torch.stack(results, 2), state
