"""Compact a layer's cache by the plan, in place, and append the new rows: `kernels.reference.update` in Triton.

A program owns CHUNK words of the keys or of the values of one KV head, so no other program touches them. Whatever the
dtype, it moves words of 32 bits: two 16-bit numbers would be taken apart and put together wherever the loop turns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl


@triton.jit
def _sources(plan, row, kept):
    """Where the rows of a tile come from; a row that is not kept comes from its own place."""
    return tl.load(plan + row, mask=row < kept, other=row)


@triton.jit
def _moving(cache, source, row, inside, width):
    """(the rows of the cache that change their place, which of them do)."""
    moves = (source[:, None] != row[:, None]) & inside
    return tl.load(cache + source[:, None] * width, mask=moves), moves


@triton.jit
def _words(of_keys, of_values, is_key, per_word: tl.constexpr):
    """A stride of the new rows, a multiple of 8 numbers, in words: a multiple of 4 allows reads of 16 bytes."""
    return tl.multiple_of(tl.where(is_key, of_keys, of_values) // per_word, 4)


@triton.jit(
    do_not_specialize=[
        *("batch", "capacity", "tokens", "plan_layers", "layer"),
        *("key_sequence", "key_head", "key_token", "value_sequence", "value_head", "value_token"),
    ]
)
def update_kernel(
    key_new,  # [B, Hkv, S, D], of the strides key_sequence, key_head, key_token
    value_new,  # [B, Hkv, S, Dv], likewise
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
    key_sequence,
    key_head,
    key_token,
    value_sequence,
    value_head,
    value_token,
    KV_HEADS: tl.constexpr,
    PLAN_HEADS: tl.constexpr,
    KEY_WORDS: tl.constexpr,
    VALUE_WORDS: tl.constexpr,
    PER_WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (ceil(max(KEY_WORDS, VALUE_WORDS) / CHUNK) * 2 * Hkv * B): the chunks of keys, then of values, by head."""
    chunks: tl.constexpr = (max(KEY_WORDS, VALUE_WORDS) + CHUNK - 1) // CHUNK
    column = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    cell = tl.program_id(0) // chunks
    is_key = cell % 2 == 0
    head, sequence = cell // 2 % KV_HEADS, cell // (2 * KV_HEADS)
    if is_key:
        cache, new = key, key_new
    else:
        cache, new = value, value_new
    width = tl.where(is_key, KEY_WORDS, VALUE_WORDS)
    cache = cache.to(tl.pointer_type(tl.int32), bitcast=True)
    cache += (sequence * KV_HEADS + head).to(tl.int64) * capacity * width + column[None, :]
    new = new.to(tl.pointer_type(tl.int32), bitcast=True)
    new += sequence.to(tl.int64) * _words(key_sequence, value_sequence, is_key, PER_WORD)
    new += head.to(tl.int64) * _words(key_head, value_head, is_key, PER_WORD)
    new_width = _words(key_token, value_token, is_key, PER_WORD)
    inside = (column < width)[None, :]

    # A step that only appends waits once: its first rows are asked for before it is known where they go.
    token = tl.arange(0, EARLY)
    fresh = tl.load(new + token[:, None] * new_width + column[None, :], mask=(token < tokens)[:, None] & inside)
    held = tl.load(length + sequence)
    kept = tl.load(keep + sequence)

    # A kept row only moves down: plan[n] >= n, in ascending order. So what a tile writes lies below all that later
    # tiles read, and these are asked for before it is written: two tiles of rows and two more of the plan are on their
    # way at once. All warps have read a tile before a barrier and write it behind it: `rows` since the last turn of the
    # loop, `more` since this one. Rows that stay where they are are neither read nor written.
    if kept > 0:
        plan_layer = tl.minimum(layer, plan_layers - 1)
        plan_head = tl.minimum(head, PLAN_HEADS - 1)
        plan += ((plan_layer * batch + sequence) * PLAN_HEADS + plan_head).to(tl.int64) * capacity
        row = tl.arange(0, BLOCK)
        rows, moves = _moving(cache, _sources(plan, row, kept), row, inside, width)
        second = _sources(plan, row + BLOCK, kept)
        third = _sources(plan, row + 2 * BLOCK, kept)
        for start in range(0, kept, 2 * BLOCK):
            row = start + tl.arange(0, BLOCK)
            more, more_moves = _moving(cache, second, row + BLOCK, inside, width)
            second = _sources(plan, row + 3 * BLOCK, kept)
            tl.debug_barrier()
            tl.store(cache + row[:, None] * width, rows, mask=moves)
            rows, moves = _moving(cache, third, row + 2 * BLOCK, inside, width)
            third = _sources(plan, row + 4 * BLOCK, kept)
            tl.store(cache + (row + BLOCK)[:, None] * width, more, mask=more_moves)

    cache += tl.where(kept >= 0, kept, held) * width
    tl.store(cache + token[:, None] * width, fresh, mask=(token < tokens)[:, None] & inside)
    for first in range(EARLY, tokens, BLOCK):
        late = first + tl.arange(0, BLOCK)
        written = (late < tokens)[:, None] & inside
        new_rows = tl.load(new + late[:, None] * new_width + column[None, :], mask=written)
        tl.store(cache + late[:, None] * width, new_rows, mask=written)
