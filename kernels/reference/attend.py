"""Attention over a masked cache, in plain torch."""

import torch
from torch import Tensor


def visible(query: Tensor, key: Tensor, window: int, chunk: int) -> Tensor:
    """Does the token at position `query` see the one at `key`? Integers that broadcast; 0 for no window, no chunks."""
    seen = key <= query
    if window:
        seen = seen & (query - key < window)
    if chunk:
        seen = seen & (query // chunk == key // chunk)
    return seen


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with GQA: query [B,Hq,S,D], key [B,Hkv,N,D], value [B,Hkv,N,Dv], mask [B,1,S,N] bool.

    A row n is seen by token s where mask is true;
    softcap c > 0 replaces the logits x by c * tanh(x / c); sinks [Hq] adds one logit per head to the softmax's
    denominator. Returns [B,Hq,S,Dv] in the dtype of value; softmax runs in float32.
    """
    if not softcap and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = (query @ key.transpose(2, 3) * scale).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend` where token s of sequence b sees the rows first[b,s] <= n <= last[b,s].

    first and last [B,S] are integers (first None: from row 0 on). A token that sees no row gives zeros. Returns
    [B,Hq,S,Dv] that lies in memory as [B,S,Hq,Dv], as the output projection reads it.
    """
    rows = torch.arange(key.shape[2], device=key.device)
    seen = rows <= last[..., None]
    if first is not None:
        seen = seen & (rows >= first[..., None])
    read = attend(query, key, value, seen[:, None], scale, softcap, sinks)
    read = read.masked_fill(~seen.any(-1)[:, None, :, None], 0.0)
    return read.transpose(1, 2).contiguous().transpose(1, 2)
