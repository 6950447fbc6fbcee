"""The gated delta rule of linear attention, token by token: the specification."""

import torch
from torch import Tensor


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run S tokens through the state of every head (arXiv 2412.06464).

    query, key [B, H, S, Dk], value [B, H, S, Dv]; decay [B, H, S] is the logarithm of what is kept of the state, rate
    [B, H, S] how far its value at the key moves to the new one; state [B, H, Dk, Dv] float32. A token with decay 0 and
    rate 0 leaves the state as it is.

    Returns what the queries read [B, H, S, Dv] and the state after the last token, both float32.
    """
    query, key, value, decay, rate = (tensor.float() for tensor in (query, key, value, decay, rate))
    results = []
    for token in range(query.shape[2]):
        at = key[:, :, token, :, None]
        state = state * decay[:, :, token, None, None].exp()
        known = (state * at).sum(2)
        state = state + at * ((value[:, :, token] - known) * rate[:, :, token, None])[:, :, None]
        results.append((state * query[:, :, token, :, None]).sum(2))
    return torch.stack(results, 2), state
