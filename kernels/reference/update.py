"""Compact a layer's cache to the planned rows and append the new; the naive version, the specification."""

import torch
from torch import Tensor


def update(
    key_new: Tensor,
    value_new: Tensor,
    length: Tensor,
    plan: Tensor,
    keep: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """Execute the last step's plan on one layer's cache, then append the S new rows.

    key_new [B, Hkv, S, D], value_new [B, Hkv, S, Dv]; length [B] rows held before the compaction; plan
    [Lp, B, Hp, C] with Lp in {1, L} and Hp in {1, Hkv} (1: shared) and keep [B] from `select`;
    key [B, Hkv, C, D], value [B, Hkv, C, Dv]. Where keep[b] >= 0, row n < keep[b] takes the content of row
    plan[layer, b, h, n] and the new rows start at keep[b]; elsewhere they start at length[b].
    The caller sees to start + S <= C.

    Returns new tensors of the shapes of key and value; rows past start + S are stale.
    """
    kv_heads, capacity = key.shape[1], key.shape[2]
    planned = plan[min(layer, plan.shape[0] - 1)].long().expand(-1, kv_heads, -1)  # [B, Hkv, C]
    row = torch.arange(capacity, device=key.device)
    compacted = torch.where(row < keep[:, None, None], planned, row)  # source row in the old cache

    start = torch.where(keep >= 0, keep, length)[:, None, None]
    appended = (row >= start) & (row < start + key_new.shape[2])
    source = torch.where(appended, capacity + row - start, compacted)  # row of cat([cache, new])
    return _gather_rows(key, key_new, source), _gather_rows(value, value_new, source)


def _gather_rows(cache: Tensor, new: Tensor, source: Tensor) -> Tensor:
    """cache [B, Hkv, C, D], new [B, Hkv, S, D], source [B, Hkv, C] -> those rows of both, [B, Hkv, C, D]."""
    rows = torch.cat([cache, new.to(cache.dtype)], dim=2)
    return rows.gather(2, source[..., None].expand(-1, -1, -1, cache.shape[-1]))
