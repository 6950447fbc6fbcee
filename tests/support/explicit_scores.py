"""Scores of keys as the paper's explicit sum over future offsets, and the choice of rows by plain loops, in float64."""

import math

import numpy as np

from keysieve.compiler.config import PolicyConfig
from support.layer_rope import LayerRope


def explicit_scores(
    key: np.ndarray,
    positions: np.ndarray,
    now: int,
    centre: np.ndarray,
    magnitude: np.ndarray,
    rope: LayerRope,
    policy: PolicyConfig,
) -> np.ndarray:
    """TriAttention's score [N] of pre-RoPE keys [N,D] at absolute positions [N], for one query head.

    now: T, the absolute position of the next token; centre [D] = E[q], magnitude [R/2] = E|q_f|, pre-RoPE.
    Dims that are not rotated add <E[q], k>, which belongs to the trigonometric term.
    """
    q, k = rope.bands(centre), rope.bands(key)  # [R/2], [N,R/2]
    squared = rope.scaling**2
    plain = key[:, rope.plain] @ centre[rope.plain] if policy.trig else np.zeros(len(key))
    norm = np.zeros(len(key))
    if policy.norm and len(rope.first):
        norm = squared * (np.abs(k) @ (magnitude - np.abs(q)))
    per_offset = []
    for offset in policy.offsets:
        distance = (now - positions + offset).astype(np.float64)  # [N]
        trig = np.zeros(len(key))
        if policy.trig:
            phase = distance[:, None] * rope.frequency + np.angle(q) - np.angle(k)
            trig = squared * (np.abs(q) * np.abs(k) * np.cos(phase)).sum(1)
        per_offset.append(trig + norm + plain)
    return np.mean(per_offset, 0) if policy.aggregation == "mean" else np.max(per_offset, 0)


def random_score(position: int, row: int, head: int, layer: int) -> float:
    """The control policy's hash to [0,1)."""
    x = ((position % 4093) * 1009 + row * 1013 + head * 31 + layer * 17) % 65521
    for _ in range(2):
        x = (x * x + 12289) % 65521
    return x / 65521


def select_rows(
    scores: np.ndarray,
    keep: int,
    front: int,
    recent: int,
    scope: str,
    kv_heads: int,
    utility: np.ndarray | None = None,
) -> tuple[list[list[list[int]]], float]:
    """Rows [L][Hkv][keep] (ascending) that stay, of scores [L,Hq,N], and the margin of the closest decision.

    Rows before `front` and the last `recent` are protected; a score that is not finite ranks last; ties go to
    the lowest row. utility [L,Hkv,N] is added to the best z-score of a group. The margin is the least difference
    between a chosen and a refused candidate, in z-scores.
    """
    layers, heads, length = scores.shape
    group = heads // kv_heads
    protected = [n for n in range(length) if n < front or n >= length - recent][:keep]
    candidates = [n for n in range(length) if front <= n < length - recent]

    z: dict[tuple[int, int, int], float] = {}
    for layer in range(layers):
        for head in range(heads):
            finite = [scores[layer, head, n] for n in candidates if math.isfinite(scores[layer, head, n])]
            mean = sum(finite) / max(len(finite), 1)
            std = math.sqrt(sum((s - mean) ** 2 for s in finite) / max(len(finite), 1))
            for n in candidates:
                s = scores[layer, head, n]
                z[layer, head, n] = (s - mean) / max(std, 1e-6) if math.isfinite(s) else -math.inf

    def best(layer: int, kv_head: int, n: int) -> float:
        more = 0.0 if utility is None else float(utility[layer, kv_head, n])
        return max(z[layer, head, n] for head in range(kv_head * group, (kv_head + 1) * group)) + more

    def value(layer: int, kv_head: int, n: int) -> float:
        if scope == "per_layer_per_head":
            return best(layer, kv_head, n)
        if scope == "per_head":
            return sum(best(other, kv_head, n) for other in range(layers)) / layers
        if scope == "union":
            return max(best(other, g, n) for other in range(layers) for g in range(kv_heads))
        raise ValueError(f"unknown scope {scope!r}")

    margin = math.inf
    plan: list[list[list[int]]] = []
    for layer in range(layers):
        plan.append([])
        for kv_head in range(kv_heads):
            values = {n: value(layer, kv_head, n) for n in candidates}
            ranked = sorted(candidates, key=lambda n: (-values[n], n))
            chosen, refused = ranked[: keep - len(protected)], ranked[keep - len(protected) :]
            plan[-1].append(sorted(protected + chosen))
            if chosen and refused and math.isfinite(values[refused[0]]):
                margin = min(margin, values[chosen[-1]] - values[refused[0]])
    return plan, margin
