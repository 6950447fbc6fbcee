"""Head shares: how many rows each KV head would hold if all rows of all layers and heads competed for the same places.

A row's value is u + z(max over the group of z(trig score)), with centres of the text's own queries (online centres) at
the end of the text; u is the gate, in nats and so comparable between heads.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.head_classes import CHOICE
from keysieve.kernels.reference.select import standardise
from keysieve.passes.policies.triattention import HALF_LIFE
from keysieve.passes.probe_rope import rotation_matrix
from keysieve.passes.rope_form import RopeForm

SINKS, RECENT = EvictionConfig.sinks, EvictionConfig.recent  # rows of every head that stay
FLOOR = SINKS + RECENT + CHOICE
OFFSETS = PolicyConfig().offsets


def trig_scores(query_pre: Tensor, key: Tensor, form: RopeForm) -> Tensor:
    """The score of every key after the last token: query_pre [Hq,N,D] before RoPE, key [Hkv,N,D] after -> [Hq,N].

    As kernels.reference.score with the mean over offsets to 4,096; online centres that started from zero.
    """
    tokens, group = query_pre.shape[1], query_pre.shape[0] // key.shape[0]
    age = torch.arange(tokens - 1, -1, -1, dtype=torch.float64)
    decay = 0.5 ** (1 / HALF_LIFE)
    weights = ((1 - decay) * decay**age).float()
    centre = torch.einsum("n,hnd->hd", weights, query_pre.float())
    key = key.float().repeat_interleave(group, 0)
    if form.kind == "nope":
        return torch.einsum("hd,hnd->hn", centre, key)
    turn = np.mean([rotation_matrix(form, tokens + offset) for offset in OFFSETS], 0)
    scores = torch.einsum("hd,hnd->hn", centre @ torch.from_numpy(turn).float().T, key)
    pair = tuple(map(torch.from_numpy, form.pairs))
    after = torch.from_numpy(form.arranged[1][: form.rotary_dim]).chunk(2)  # both dims of every band, once rotated
    magnitude = torch.einsum("n,hnf->hf", weights, _magnitudes(query_pre.float(), *pair))
    excess = (magnitude - _magnitudes(centre, *pair)).clamp(min=0) * form.scaling
    return scores + torch.einsum("hf,hnf->hn", excess, _magnitudes(key, *after))


def row_values(gate: Tensor, scores: Tensor) -> Tensor:
    """u [N,Hkv] and scores [Hq,N] -> the candidates' values [Hkv, N - sinks - recent]."""
    tokens, kv_heads = gate.shape
    scores = scores[:, SINKS : tokens - RECENT]
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    best = standardise(scores, everywhere).reshape(kv_heads, -1, scores.shape[1]).amax(1)
    return gate.T[:, SINKS : tokens - RECENT] + standardise(best, everywhere[:kv_heads])


def rows_held(values: Sequence[Tensor], budget: int) -> list[np.ndarray]:
    """How many rows each head of each layer holds [Hkv] if the best rows of all win.

    values: the candidates' of each layer [Hkv,M]. Every head keeps its sinks, its recent rows and its CHOICE best
    candidates; all others compete for what is left of `budget` rows a head. The counts add up to that times the heads.
    """
    best_first = [layer.sort(-1, descending=True).values[:, CHOICE:] for layer in values]
    heads = sum(len(layer) for layer in values)
    places = min(heads * (budget - FLOOR), sum(layer.numel() for layer in best_first))
    row = torch.cat([layer.flatten() for layer in best_first])
    wins = torch.zeros(len(row), dtype=torch.bool)
    wins[row.argsort(descending=True, stable=True)[:places]] = True
    held, start = [], 0
    for layer in best_first:
        held.append(FLOOR + wins[start : start + layer.numel()].reshape(layer.shape).sum(1).double().numpy())
        start += layer.numel()
    return held


def usable_budgets(budgets: Sequence[int], context: int) -> list[int]:
    """Those at which heads can differ on texts of `context` tokens: above the floor, and half of the text at most."""
    return [budget for budget in budgets if FLOOR < budget <= context // 2]


def _magnitudes(vectors: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """[...,D] -> [...,R/2]."""
    return torch.hypot(vectors[..., real], vectors[..., imaginary])
