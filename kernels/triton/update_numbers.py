"""`kernels.reference.update` in Triton for rows of one number each, which are too narrow for reads of 16 bytes.

A program owns the numbers of one KV head in one of both caches.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "capacity", "tokens", "plan_layers", "layer"])
def update_numbers_kernel(
    key_new,  # float32 [B, Hkv, S, 1]
    value_new,  # likewise
    length,  # int32 [B]
    plan,  # int32 [Lp, B, Hp, C]
    keep,  # int32 [B]
    key,  # float32 [B, Hkv, C, 1], changed
    value,  # likewise
    batch,
    capacity,
    tokens,  # S
    plan_layers,  # Lp
    layer,
    KV_HEADS: tl.constexpr,
    PLAN_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (2 * Hkv * B): keys and values, by head."""
    cell = tl.program_id(0) // 2
    head, sequence = cell % KV_HEADS, cell // KV_HEADS
    if tl.program_id(0) % 2 == 0:
        cache, new = key, key_new
    else:
        cache, new = value, value_new
    cache += cell.to(tl.int64) * capacity
    new += cell.to(tl.int64) * tokens
    kept = tl.load(keep + sequence)
    if kept > 0:
        plan_layer, plan_head = tl.minimum(layer, plan_layers - 1), tl.minimum(head, PLAN_HEADS - 1)
        plan += ((plan_layer * batch + sequence) * PLAN_HEADS + plan_head).to(tl.int64) * capacity
        # A kept row only moves down, so later tiles read nothing that this one writes.
        for start in range(0, kept, BLOCK):
            row = start + tl.arange(0, BLOCK)
            source = tl.load(plan + row, mask=row < kept, other=0)
            number = tl.load(cache + source, mask=row < kept, other=0.0)
            tl.debug_barrier()
            tl.store(cache + row, number, mask=row < kept)
        tl.debug_barrier()
    cache += tl.where(kept >= 0, kept, tl.load(length + sequence))
    for first in range(0, tokens, BLOCK):
        late = first + tl.arange(0, BLOCK)
        tl.store(cache + late, tl.load(new + late, mask=late < tokens, other=0.0), mask=late < tokens)
