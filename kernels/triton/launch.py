"""Run the kernels on tensors: on a GPU, or on a CPU in Triton's interpreter.

The functions take what the ops of `keysieve.plugins` take, and compute what the reference does; those that end in an
underscore change their arguments. Nothing waits for the GPU and nothing is read from it, so all of them but `score`,
which copies a table to it, can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from keysieve.kernels.triton import attend_variant, variants
from keysieve.kernels.triton.configuration import needs_stats
from keysieve.kernels.triton.variants import Variant


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
    """Change key [B,Hkv,C,D] and value [B,Hkv,C,Dv] in place to what the reference returns.

    key_new and value_new may have any strides, but for numbers of a row side by side; plan may repeat one head. Rows of
    one number are float32.
    """
    batch, kv_heads, capacity, head_dim = key.shape
    if plan.stride(2) == 0:  # expanded over its heads
        plan = plan[:, :, :1]
    if head_dim == value.shape[3] == 1:
        variant = variants.update_numbers(kv_heads, plan.shape[2])
        tensors = (key_new.contiguous(), value_new.contiguous(), length, plan.contiguous(), keep, key, value)
        _run(variant, batch, capacity, *tensors, batch, capacity, key_new.shape[2], plan.shape[0], layer)
        return
    key_new, value_new = _wide(key_new.to(key.dtype)), _wide(value_new.to(value.dtype))
    sizes = (kv_heads, plan.shape[2], head_dim, value.shape[3], _dtype(key))
    variant = variants.update(*sizes)
    if variant.grid.of(batch, capacity)[0] < _processors(key.device):
        variant = variants.update(*sizes, chunk_bytes=variants.SMALL_CHUNK_BYTES)
    tensors = (key_new, value_new, length, plan.contiguous(), keep, key, value)
    numbers = (batch, capacity, key_new.shape[2], plan.shape[0], layer)
    _run(variant, batch, capacity, *tensors, *numbers, *_strides(key_new), *_strides(value_new))


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
    """As the reference: copies of key and value, changed."""
    key, value = key.clone(), value.clone()
    update_(key_new, value_new, length, plan, keep, key, value, layer)
    return key, value


def score(
    length: Tensor,
    limit: Tensor,
    position: Tensor,
    centre: Tensor,
    weight: Tensor,
    keys: Sequence[Tensor],
    policy: str,
    query_heads: int,
    rotary_dim: int,
    interleaved: int,
    scores: Tensor | None = None,
) -> Tensor:
    """As the reference: scores [L,B,Hq,C], but unspecified where nothing is due and for rows that are not held.

    scores: written where they are given.
    """
    addresses = torch.tensor([key.data_ptr() for key in keys], device=keys[0].device)
    return score_at(
        length, limit, position, centre, weight, keys, addresses, policy, query_heads, rotary_dim, interleaved, scores
    )


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
    scores: Tensor | None = None,
) -> Tensor:
    """`score` with a table of where the keys lie, addresses [L] int64."""
    batch, kv_heads, capacity, head_dim = keys[0].shape
    offsets = centre.shape[3] if policy == "trig" else 1
    if scores is None:
        scores = length.new_empty((len(keys), batch, query_heads, capacity), dtype=torch.float32)
    variant = variants.score(
        len(keys), query_heads, kv_heads, head_dim, offsets, rotary_dim, bool(interleaved), policy, _dtype(keys[0])
    )
    tensors = (addresses, centre.contiguous(), weight.contiguous(), length, limit, position, scores)
    _run(variant, batch, capacity, *tensors, batch, capacity)
    return scores


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
    """As the reference: plan [L or 1,B,Hkv or 1,C], keep [B], evicted [B]; the plan is unspecified where not due."""
    layers, batch, _, capacity = scores.shape
    plan_layers, plan_heads = (layers if scope == "per_layer_per_head" else 1), (1 if scope == "union" else kv_heads)
    plan = length.new_empty((plan_layers, batch, plan_heads, capacity), dtype=torch.int32)
    keep, evicted = torch.empty_like(length), torch.empty_like(length)
    select_(scores, length, limit, budget, pinned, plan, keep, evicted, scope, kv_heads, sinks, recent, utility)
    return plan, keep, evicted


def select_(
    scores: Tensor,
    length: Tensor,
    limit: Tensor,
    budget: Tensor,
    pinned: Tensor,
    plan: Tensor,
    keep: Tensor,
    evicted: Tensor,
    scope: str,
    kv_heads: int,
    sinks: int,
    recent: int,
    utility: Tensor | None = None,
) -> None:
    """`select` into given tensors; the plans of sequences that are not due are left alone."""
    layers, batch, query_heads, capacity = scores.shape
    sizes = (layers, query_heads, kv_heads, sinks, recent)
    variant = variants.select_plan(*sizes, scope, utility is not None)
    stats = scores
    if needs_stats(scope):
        stats = scores.new_empty((layers, batch, query_heads, 4))
        arguments = (scores, length, limit, pinned, stats)
        _run(variants.select_stats(*sizes), batch, capacity, *arguments, batch, capacity)
    ranks = torch.empty_like(plan, dtype=torch.uint32)
    more = scores if utility is None else utility.contiguous()
    tensors = (scores, stats, length, limit, budget, pinned, more, ranks, plan, keep, evicted)
    _run(variant, batch, capacity, *tensors, batch, capacity)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    counters: Tensor | None = None,
) -> Tensor:
    """Attention over the rows first <= n <= last of a cache: [B,Hq,S,Dv], which lies in memory as [B,S,Hq,Dv].

    query [B,Hq,S,D] of any strides, but for numbers of a row side by side; key [B,Hkv,C,D], value [B,Hkv,C,Dv]; first
    and last [B,S] integers (first None: from row 0 on); sinks [Hq] or None. counters int32: zeros, which are zeros
    again afterwards, for launches that run one after the other; without, or with too few of them, a launch makes its
    own. Raises ConfigError for sizes that the kernel does not take.
    """
    batch, heads, tokens, head_dim = query.shape
    _, kv_heads, capacity, value_dim = value.shape
    work = attend_variant.attend(
        batch, tokens, capacity, heads, kv_heads, head_dim, value_dim, _dtype(key), _processors(key.device),
        first is not None, sinks is not None, float(softcap),
    )  # fmt: skip
    query = _wide(query)
    out = value.new_empty((batch, tokens, heads, value_dim))
    parts = weights = arrived = last  # not used by one program alone
    if work.splits > 1:
        tiles = batch * kv_heads * work.tiles
        parts = value.new_empty(tiles * work.splits * work.part * value_dim, dtype=torch.float32)
        weights = value.new_empty(tiles * work.splits * work.part * 2, dtype=torch.float32)
        if counters is None or counters.numel() < tiles:
            counters = torch.zeros(tiles, dtype=torch.int32, device=key.device)
        arrived = counters
    seen = (last if first is None else first.contiguous(), last.contiguous(), query if sinks is None else sinks)
    tensors = (query, key.contiguous(), value.contiguous(), *seen, out, parts, weights, arrived)
    _run(work.variant, batch, capacity, *tensors, scale, capacity, tokens, work.splits, *_strides(query))
    return out.transpose(1, 2)


def _run(variant: Variant, batch: int, capacity: int, *arguments: Tensor | int | float) -> None:
    grid = variant.grid.of(batch, capacity)
    if not grid[0]:
        return
    with torch.cuda.device_of(arguments[0]):
        variant.kernel[grid](*arguments, **variant.constants, num_warps=variant.num_warps, num_stages=1)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _strides(tensor: Tensor) -> list[int]:
    """Of all axes but the last; 0 for an axis of one, whose stride means nothing."""
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]


def _wide(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows cannot be read 16 bytes at once."""
    aligned = tensor.stride(3) == 1 and not any(stride % 8 for stride in _strides(tensor))
    return tensor if aligned else tensor.contiguous()


@lru_cache
def _processors(device: torch.device) -> int:
    """Of a GPU; a small one on a CPU, so that its programs share work in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
