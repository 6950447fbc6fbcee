"""Attention over the rows of a cache that the tokens see: the Triton form of `kernels.reference.attend_rows`.

The query heads of a KV head and the tokens are the rows of one matrix, row token * G + head; a program takes BLOCK_M of
them, so each key and each value is read once for the whole group. Only rows that some token of the program sees are
read: from the first to the last of them, whatever the capacity.

Where too few programs would fill the GPU, several share one tile of queries, each with its part of the rows. The one
that finishes last adds what they found, always in the order of the rows, so equal inputs give equal bytes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row_tile(matrix, row, inside, stride, width: tl.constexpr, padded: tl.constexpr):
    """Rows of `matrix` as [rows, padded], zeros behind the width and where not `inside`."""
    column = tl.arange(0, padded)
    mask = inside[:, None]
    if padded > width:
        mask = mask & (column < width)[None, :]
    return tl.load(matrix + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _finite(top):
    """The highest logit to count from; any number will do where no row was seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _finish(out, at, head, live, found, top, total, sinks, width: tl.constexpr, with_sinks: tl.constexpr):
    """Divide what was found by its weight and write it: `found` [rows, width padded], the others [rows]."""
    if with_sinks:
        # One more logit, whose value is zero.
        logit = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2_E
        highest = _finite(tl.maximum(top, logit))
        before = tl.exp2(top - highest)
        found *= before[:, None]
        total = total * before + tl.exp2(logit - highest)
    found = found / tl.where(total > 0.0, total, 1.0)[:, None]  # a token that sees no row found zeros
    column = tl.arange(0, found.shape[1])
    tl.store(
        out + at[:, None] + column[None, :],
        found.to(out.dtype.element_ty),
        mask=live[:, None] & (column < width)[None, :],
    )


@triton.jit(do_not_specialize=["capacity", "tokens", "splits", "query_sequence", "query_head", "query_token"])
def attend_kernel(
    query,  # [B, Hq, S, D], of the strides below, which are multiples of 8
    key,  # [B, Hkv, C, D]
    value,  # [B, Hkv, C, Dv]
    first,  # integers [B, S], read with WINDOWED
    last,  # integers [B, S]
    sinks,  # floats [Hq], read with SINKS
    out,  # [B, S, Hq, Dv], written
    parts,  # float32 [B * Hkv * tiles, splits, PART_M, Dv], workspace where splits > 1
    weights,  # float32 [B * Hkv * tiles, splits, 2, PART_M], workspace: highest logit, sum of weights
    arrived,  # int32 [B * Hkv * tiles], zeros where splits > 1, and zeros again afterwards
    scale,
    capacity,
    tokens,  # S
    splits,
    query_sequence,
    query_head,
    query_token,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
):
    """Grid (B * Hkv * tiles * splits), where tiles of BLOCK_M rows cover the G * S of a KV head."""
    split = tl.program_id(0) % splits
    place = tl.program_id(0) // splits
    tiles = tl.cdiv(GROUP * tokens, BLOCK_M)
    tile, cell = place % tiles, place // tiles
    sequence, kv_head = cell // KV_HEADS, cell % KV_HEADS

    lane = tl.arange(0, BLOCK_M)
    token = (tile * BLOCK_M + lane) // GROUP
    head = kv_head * GROUP + (tile * BLOCK_M + lane) % GROUP
    live = token < tokens
    to = tl.load(last + sequence * tokens + token, mask=live, other=-1)
    to = tl.minimum(to, capacity - 1).to(tl.int32)
    if WINDOWED:
        since = tl.load(first + sequence * tokens + token, mask=live, other=0)
        since = tl.maximum(since, 0).to(tl.int32)
    else:
        since = tl.zeros((BLOCK_M,), tl.int32)
    begin = tl.min(tl.where(since <= to, since, capacity), axis=0)
    end = tl.max(tl.where(since <= to, to + 1, 0), axis=0)

    # This program's share of the rows. They are counted here and not by the host, who launches before they are known.
    rows = tl.maximum(end - begin, 0)
    share = tl.maximum(tl.cdiv(rows, splits), MIN_ROWS)
    shares = tl.cdiv(rows, share)
    begin += split * share
    end = tl.minimum(begin + share, end)
    if split >= tl.maximum(shares, 1):
        return

    # Tensor cores multiply no fewer than 16 numbers.
    key_padded: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    value_padded: tl.constexpr = max(16, triton.next_power_of_2(VALUE_DIM))
    at = sequence.to(tl.int64) * query_sequence + head.to(tl.int64) * query_head + token.to(tl.int64) * query_token
    at = tl.multiple_of(at, [8])
    queries = _row_tile(query, at, live, 1, HEAD_DIM, key_padded)
    key += cell.to(tl.int64) * capacity * HEAD_DIM
    value += cell.to(tl.int64) * capacity * VALUE_DIM
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M, value_padded), tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        inside = row < end
        keys = _row_tile(key, row, inside, HEAD_DIM, HEAD_DIM, key_padded)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if SOFTCAP > 0.0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is exact at both ends.
            turned = tl.exp2(logits * (scale * (2.0 * LOG2_E / SOFTCAP)))
            logits = (1.0 - 2.0 / (turned + 1.0)) * (SOFTCAP * LOG2_E)
        else:
            logits *= scale * LOG2_E
        seen = inside[None, :] & (row[None, :] >= since[:, None]) & (row[None, :] <= to[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, axis=1))
        weight = tl.exp2(logits - _finite(highest)[:, None])
        before = tl.exp2(top - _finite(highest))
        total = total * before + tl.sum(weight, axis=1)
        values = _row_tile(value, row, inside, VALUE_DIM, VALUE_DIM, value_padded)
        found = tl.dot(weight.to(values.dtype), values, found * before[:, None], input_precision="ieee")
        top = highest

    heads: tl.constexpr = KV_HEADS * GROUP
    written = ((sequence * tokens + token).to(tl.int64) * heads + head) * VALUE_DIM
    if not SPLIT or shares <= 1:
        _finish(out, written, head, live, found, top, total, sinks, VALUE_DIM, SINKS)
        return

    parts += place.to(tl.int64) * splits * (PART_M * VALUE_DIM)
    weights += place * splits * (2 * PART_M)
    column = tl.arange(0, value_padded)
    mine = (lane < PART_M)[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(parts + (split * PART_M + lane)[:, None] * VALUE_DIM + column[None, :], found, mask=mine)
    tl.store(weights + split * 2 * PART_M + lane, top, mask=lane < PART_M)
    tl.store(weights + split * 2 * PART_M + PART_M + lane, total, mask=lane < PART_M)
    tl.debug_barrier()  # all of the block's writes come before its arrival
    if tl.atomic_add(arrived + place, 1, sem="acq_rel") < shares - 1:
        return

    tl.store(arrived + place, 0)
    lane = tl.arange(0, PART_M)
    token = (tile * BLOCK_M + lane) // GROUP
    head = kv_head * GROUP + (tile * BLOCK_M + lane) % GROUP
    live = token < tokens
    top = tl.full((PART_M,), float("-inf"), tl.float32)
    total = tl.zeros((PART_M,), tl.float32)
    found = tl.zeros((PART_M, value_padded), tl.float32)
    for start in tl.range(0, shares, PARTS_AT_ONCE):
        part = start + tl.arange(0, PARTS_AT_ONCE)
        here = (part * 2 * PART_M)[:, None] + lane[None, :]
        known = (part < shares)[:, None] & (lane < PART_M)[None, :]
        tops = tl.load(weights + here, mask=known, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(weights + here + PART_M, mask=known, other=0.0, cache_modifier=".cg")
        there = (part * PART_M)[:, None, None] + lane[None, :, None]
        known = (part < shares)[:, None, None] & (column < VALUE_DIM)[None, None, :]
        each = tl.load(parts + there * VALUE_DIM + column[None, None, :], mask=known, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(top, tl.max(tops, axis=0))
        weight = tl.exp2(tops - _finite(highest)[None, :])
        before = tl.exp2(top - _finite(highest))
        total = total * before + tl.sum(weight * totals, axis=0)
        found = found * before[:, None] + tl.sum(weight[:, :, None] * each, axis=0)
        top = highest
    written = ((sequence * tokens + token).to(tl.int64) * heads + head) * VALUE_DIM
    _finish(out, written, head, live, found, top, total, sinks, VALUE_DIM, SINKS)
