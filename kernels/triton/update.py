"""Compact a layer's cache by the plan, in place, and append the new rows: `kernels.reference.update` in Triton.

A program owns CHUNK columns of the keys or of the values of one KV head, so no other program touches them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "capacity", "tokens", "plan_layers", "layer"])
def update_kernel(
    key_new,  # [B, Hkv, S, D]
    value_new,  # [B, Hkv, S, Dv]
    length,  # int32 [B]
    plan,  # int32 [Lp, B, Hp, C]
    keep,  # int32 [B]
    key,  # [B, Hkv, C, D], changed
    value,  # [B, Hkv, C, Dv], changed
    batch,
    capacity,
    tokens,  # S
    plan_layers,  # Lp
    layer,
    KV_HEADS: tl.constexpr,
    PLAN_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (ceil(max(D, Dv) / CHUNK), 2 * Hkv, B): even second indices are keys, odd ones values."""
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(1) // 2
    sequence = tl.program_id(2)
    is_key = tl.program_id(1) % 2 == 0
    if is_key:
        cache, new = key, key_new
    else:
        cache, new = value, value_new
    width = tl.where(is_key, HEAD_DIM, VALUE_DIM)
    cell = (sequence * KV_HEADS + head).to(tl.int64)
    cache += cell * capacity * width + column[None, :]
    new += cell * tokens * width + column[None, :]
    inside = (column < width)[None, :]
    kept = tl.load(keep + sequence)
    plan_layer = tl.minimum(layer, plan_layers - 1)
    plan_head = tl.minimum(head, PLAN_HEADS - 1)
    plan += ((plan_layer * batch + sequence) * PLAN_HEADS + plan_head).to(tl.int64) * capacity

    # A kept row only moves down: plan[n] >= n, in ascending order. So what a tile writes lies below all that
    # later tiles read, and within a tile the barrier puts every read before every write.
    for start in range(0, kept, BLOCK):
        row = start + tl.arange(0, BLOCK)
        source = tl.load(plan + row, mask=row < kept, other=0)
        moves = ((row < kept) & (source != row))[:, None] & inside
        rows = tl.load(cache + source[:, None] * width, mask=moves, other=0.0)
        tl.debug_barrier()
        tl.store(cache + row[:, None] * width, rows, mask=moves)

    start = tl.where(kept >= 0, kept, tl.load(length + sequence))
    cache += start * width
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        written = (token < tokens)[:, None] & inside
        rows = tl.load(new + token[:, None] * width, mask=written, other=0.0)
        tl.store(cache + token[:, None] * width, rows, mask=written)
