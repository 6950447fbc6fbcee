"""Which rows stay: scores to an ordered list of kept rows; the naive version, which is the specification."""

import torch
from torch import Tensor

from keysieve.errors import ConfigError
from keysieve.kernels import SCOPES

STD_FLOOR = 1e-6


def select(
    scores: Tensor,
    length: Tensor,
    limit: Tensor,
    budget: Tensor,
    pinned: Tensor,
    scope: str,
    kv_heads: int,
    sinks: int,
    recent: int,
    utility: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan the next compaction of every sequence that is due (length >= limit).

    scores [L, B, Hq, C]; length, limit, budget, pinned [B]; utility [L*B, Hkv, C, 1], in the scale of a z-score, is
    added to the best z-score of each KV head's group. Always kept: the first max(sinks, pinned) rows and the last
    `recent` rows. The other rows held are candidates: their scores are z-scored per layer and query head (population
    std, at least 1e-6), then aggregated by scope: "per_layer_per_head" (max over a KV head's group), "per_head" (then
    mean over layers) or "union" (max over everything). A row whose score or utility is not finite ranks last; ties go
    to the lowest row. If the protected rows exceed the budget, their lowest stay.

    Returns plan [L or 1, B, Hkv or 1, C] int32: the kept rows in ascending order, then zeros; keep [B] int32:
    how many rows that is, or -1 if the sequence is not due; evicted [B] int32.
    Raises ConfigError for an unknown scope.
    """
    layers, batch, _, capacity = scores.shape
    due = length >= limit
    row = torch.arange(capacity, device=scores.device)
    held = row < length[:, None]  # [B, C]
    front = pinned.clamp(min=sinks)[:, None]
    protected = held & ((row < front) | (row >= length[:, None] - recent))
    candidate = held & ~protected

    z = standardise(scores, candidate[None, :, None, :].expand_as(scores))
    best = z.reshape(layers, batch, kv_heads, -1, capacity).amax(dim=3)
    if utility is not None:
        best = best + utility.reshape(best.shape)
        best = torch.where(torch.isfinite(best), best, -torch.inf)
    rank_by = _aggregate(best, scope)  # [Lp, B, Hp, C]
    # A row not held ties with a non-finite candidate at -inf; it loses, because its index is higher.
    rank_by = rank_by.masked_fill(protected[None, :, None, :], torch.inf)

    kept = torch.where(due, torch.minimum(budget, length), 0)  # [B]
    plan = _lowest_first(rank_by, kept)
    keep = torch.where(due, kept, -1).to(torch.int32)
    evicted = torch.where(due, length - kept, 0).to(torch.int32)
    return plan, keep, evicted


def standardise(scores: Tensor, candidate: Tensor) -> Tensor:
    """The z-score of every candidate among the finite candidates of its head; -inf for all others.

    scores, candidate [..., C] -> [..., C], float32 (float64 for float64 scores).
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    usable = candidate & torch.isfinite(scores)
    count = usable.sum(dim=-1, keepdim=True).clamp(min=1)
    # Counted from the highest score, so that the mean of constant scores is exact and their z is 0.
    highest = torch.where(usable, scores, -torch.inf).amax(dim=-1, keepdim=True)
    below = torch.where(usable, scores - highest, 0)
    mean = below.sum(dim=-1, keepdim=True) / count
    centred = torch.where(usable, below - mean, 0)
    std = torch.sqrt((centred * centred).sum(dim=-1, keepdim=True) / count)
    z = centred / std.clamp(min=STD_FLOOR)
    return torch.where(usable & torch.isfinite(z), z, -torch.inf)


def _aggregate(group_max: Tensor, scope: str) -> Tensor:
    """[L, B, Hkv, C] -> [L, B, Hkv, C], [1, B, Hkv, C] or [1, B, 1, C], by scope."""
    if scope == "per_layer_per_head":
        return group_max
    if scope == "per_head":
        return group_max.mean(dim=0, keepdim=True)
    if scope == "union":
        return group_max.amax(dim=(0, 2), keepdim=True)
    raise ConfigError(f"unknown scope {scope!r}; choose one of {', '.join(SCOPES)}")


def _lowest_first(rank_by: Tensor, kept: Tensor) -> Tensor:
    """The `kept` [B] highest rows of rank_by [Lp, B, Hp, C] in ascending order, then zeros; int32."""
    capacity = rank_by.shape[-1]
    row = torch.arange(capacity, device=rank_by.device)
    chosen = row < kept[:, None, None]  # [B, 1, C]
    best_first = rank_by.argsort(dim=-1, descending=True, stable=True)
    ascending = torch.where(chosen, best_first, capacity).sort(dim=-1).values
    return torch.where(chosen, ascending, 0).to(torch.int32)
