"""The contract's nodes on buffers that stay where they are, as the torch engine runs them.

`update_` and `select_` change their arguments; `score_at` reads the caches through a table of their addresses, and
`attend_at` counts in a buffer that is given. They compute what `update`, `select`, `score` and `attend` do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

import keysieve.plugins.torch.ops  # noqa: F401  (registers the functional forms)
from keysieve.kernels import reference

COUNTERS = 1024  # of attend_at: more than there are programs that share rows, see kernels.triton.attend_variant


@custom_op("keysieve::update_", mutates_args=("key", "value"))
def update_(
    key_new: Tensor,
    value_new: Tensor,
    length: Tensor,
    plan: Tensor,
    keep: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
) -> None:
    """See keysieve.kernels.reference.update; key and value become what it returns."""
    for cache, new in zip(
        (key, value), reference.update(key_new, value_new, length, plan, keep, key, value, layer), strict=True
    ):
        cache.copy_(new)


@custom_op("keysieve::attend_at", mutates_args=())
def attend_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor,
    sinks: Tensor | None,
    counters: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """See keysieve.kernels.reference.attend_rows; counters int32: zeros, which are zeros again afterwards."""
    return reference.attend_rows(query, key, value, first, last, scale, softcap, sinks)


@attend_at.register_fake
def _(query, key, value, first, last, sinks, counters, scale, softcap):  # type: ignore[no-untyped-def]
    return torch.ops.keysieve.attend(query, key, value, first, last, sinks, scale, softcap)


@custom_op("keysieve::score_at", mutates_args=())
def score_at(
    length: Tensor,
    limit: Tensor,
    position: Tensor,
    centre: Tensor,
    weight: Tensor,
    keys: Sequence[Tensor],
    addresses: Tensor,
    policy: str,
    query_heads: int,
    rotary_dim: int,
    interleaved: int,
) -> Tensor:
    """See keysieve.kernels.reference.score; addresses [L] int64: where the keys lie, for kernels that read a table."""
    return reference.score(length, limit, position, centre, weight, keys, policy, query_heads, rotary_dim, interleaved)


@score_at.register_fake
def _(length, limit, position, centre, weight, keys, addresses, policy, query_heads, rotary_dim, interleaved):  # type: ignore[no-untyped-def]
    constants = policy, query_heads, rotary_dim, interleaved
    return torch.ops.keysieve.score(length, limit, position, centre, weight, keys, *constants)


# keep and evicted are returned: a compiler that fuses may read a number of the step before after it was changed.
@custom_op("keysieve::select_", mutates_args=("plan",))
def select_(
    scores: Tensor,
    length: Tensor,
    limit: Tensor,
    budget: Tensor,
    pinned: Tensor,
    plan: Tensor,
    scope: str,
    kv_heads: int,
    sinks: int,
    recent: int,
    utility: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See keysieve.kernels.reference.select; plan becomes what it returns, as far as anything is due."""
    found, keep, evicted = reference.select(
        scores, length, limit, budget, pinned, scope, kv_heads, sinks, recent, utility
    )
    plan.copy_(found)
    return keep, evicted


@select_.register_fake
def _(scores, length, limit, budget, pinned, plan, scope, kv_heads, sinks, recent, utility=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(length), torch.empty_like(length)
