"""Score every cached key of every layer in one launch: the Triton form of `kernels.reference.score`.

A program takes BLOCK rows of one KV head of one sequence of one layer, TILE rows at a time. It reads each key
once, whatever the number of query heads and offsets, and multiplies and sums in float32 without tensor cores.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl

from keysieve.kernels.triton.due import any_due, rounds


@triton.jit
def _row_tile(cache, row, inside, width: tl.constexpr, padded: tl.constexpr, stride: tl.constexpr):
    """Rows of `cache` as float32 [TILE, padded]: zero behind `width` columns and outside the rows held."""
    column = tl.arange(0, padded)
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(cache + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rotary_pairs(cache, row, inside, rotary_dim: tl.constexpr, interleaved: tl.constexpr, stride: tl.constexpr):
    """The two halves of every rotary pair, each [TILE, bands padded to a power of two]."""
    bands: tl.constexpr = triton.next_power_of_2(rotary_dim // 2)
    if interleaved:
        both = _row_tile(cache, row, inside, rotary_dim, 2 * bands, stride)
        return tl.split(tl.reshape(both, (row.shape[0], bands, 2)))
    else:  # noqa: RET505 - Triton needs the two branches of a constant condition
        real = _row_tile(cache, row, inside, rotary_dim // 2, bands, stride)
        imaginary = _row_tile(cache + rotary_dim // 2, row, inside, rotary_dim // 2, bands, stride)
        return real, imaginary


@triton.jit
def _ask_for(cache, first, held, width: tl.constexpr, rows: tl.constexpr):
    """Have the L2 cache fetch `rows` rows from `first`, as far as they are held. Nothing waits for them."""
    step: tl.constexpr = 1024 // cache.dtype.element_ty.primitive_bitwidth  # numbers in a line of 128 bytes
    line = first * width + tl.arange(0, triton.next_power_of_2((rows * width + step - 1) // step)) * step
    pointer = cache + tl.minimum(line, held * width - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _cache_of(keys, layer, cell, capacity, width: tl.constexpr, dtype: tl.constexpr):
    """Where the rows of KV head and sequence `cell` of a layer begin."""
    return tl.multiple_of(tl.load(keys + layer).to(tl.pointer_type(dtype)), 16) + cell.to(tl.int64) * capacity * width


@triton.jit
def _vector(pointer, width: tl.constexpr, padded: tl.constexpr, step: tl.constexpr):
    """`width` floats, `step` apart, as [1, padded] with zeros behind."""
    column = tl.arange(0, padded)
    return tl.load(pointer + column * step, mask=column < width, other=0.0)[None, :]


@triton.jit
def _hash(position, row, head, layer):
    """The reference's hash to [0, 1); every intermediate fits into 32 bits without a sign."""
    x = (position % 4093).to(tl.uint32) * 1009 + row.to(tl.uint32) * 1013
    x = (x + head.to(tl.uint32) * 31 + layer.to(tl.uint32) * 17) % 65521
    x = (x * x + 12289) % 65521
    x = (x * x + 12289) % 65521
    return tl.math.div_rn(x.to(tl.float32), 65521.0)


@triton.jit(do_not_specialize=["batch", "capacity"])
def score_kernel(
    keys,  # int64 [L]: the address of each layer's cache [B, Hkv, C, D]
    centre,  # float32 [L, B, Hq, J, D]
    weight,  # float32 [L, B, Hq, R/2]
    length,  # int32 [B]
    limit,  # int32 [B]
    position,  # int64 [B]
    scores,  # float32 [L, B, Hq, C], written for the rows held of sequences that are due
    batch,
    capacity,
    LAYERS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    OFFSETS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POLICY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Grid (any number of programs): they share the parts, BLOCK rows of a KV head of a layer, of what is due."""
    if not any_due(length, limit, batch):
        return
    part = tl.program_id(0)
    for sequence in range(batch):
        held = tl.load(length + sequence)
        if held >= tl.load(limit + sequence):
            blocks = tl.cdiv(held, BLOCK)
            parts = LAYERS * KV_HEADS * blocks
            mine = rounds(part, parts)
            for turn in range(mine):
                one = part + turn * tl.num_programs(0)
                layer, kv_head = one // blocks // KV_HEADS, one // blocks % KV_HEADS
                cache = _cache_of(keys, layer, sequence * KV_HEADS + kv_head, capacity, HEAD_DIM, DTYPE)
                if PREFETCH:
                    # The first rows of the part that comes next; those behind them are asked for tile by tile.
                    later = tl.minimum(one + tl.num_programs(0), parts - 1)
                    cell = sequence * KV_HEADS + later // blocks % KV_HEADS
                    next_cache = _cache_of(keys, later // blocks // KV_HEADS, cell, capacity, HEAD_DIM, DTYPE)
                    _ask_for(next_cache, later % blocks * BLOCK, held, HEAD_DIM, TILE)
                _score_rows(
                    cache, centre, weight, position, scores, batch, capacity, sequence, held, layer, kv_head,
                    one % blocks * BLOCK, QUERY_HEADS, KV_HEADS, OFFSETS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, POLICY,
                    BLOCK, TILE, PREFETCH,
                )  # fmt: skip
            part += mine * tl.num_programs(0) - parts


@triton.jit
def _score_rows(
    cache, centre, weight, position, scores, batch, capacity, sequence, held, layer, kv_head, first,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, OFFSETS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, POLICY: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """BLOCK rows from `first` of `cache`, which is of one KV head of one sequence of one layer."""
    group: tl.constexpr = QUERY_HEADS // KV_HEADS
    bands: tl.constexpr = ROTARY_DIM // 2
    bands_padded: tl.constexpr = triton.next_power_of_2(bands)
    rest: tl.constexpr = HEAD_DIM - ROTARY_DIM
    rest_padded: tl.constexpr = triton.next_power_of_2(rest)
    # A head's second half of a pair is `turn` floats behind its first, and its bands are `step` floats apart.
    turn: tl.constexpr = 1 if INTERLEAVED else bands
    step: tl.constexpr = 2 if INTERLEAVED else 1
    at_once: tl.constexpr = 4 if group % 4 == 0 else 3 if group % 3 == 0 else 2 if group % 2 == 0 else 1
    unrolled: tl.constexpr = at_once if OFFSETS == 1 else 1
    first_head = (layer * batch + sequence).to(tl.int64) * QUERY_HEADS + kv_head * group

    for start in range(first, tl.minimum(first + BLOCK, held), TILE):
        if PREFETCH:
            _ask_for(cache, start + TILE, held, HEAD_DIM, TILE)
        row = start + tl.arange(0, TILE)
        inside = row < held
        if POLICY == "trig":
            if bands > 0:
                real, imaginary = _rotary_pairs(cache, row, inside, ROTARY_DIM, INTERLEAVED, HEAD_DIM)
                magnitude = tl.sqrt(real * real + imaginary * imaginary)
            if rest > 0:
                unrotated = _row_tile(cache + ROTARY_DIM, row, inside, rest, rest_padded, HEAD_DIM)
            for head in tl.range(group, loop_unroll_factor=unrolled):
                query = centre + (first_head + head) * (OFFSETS * HEAD_DIM)
                best = tl.full((TILE,), float("-inf"), tl.float32)
                for _ in tl.range(OFFSETS, loop_unroll_factor=1):
                    along = tl.zeros((TILE,), tl.float32)
                    if bands > 0:
                        # With one offset the norms join this sum and save a reduction of their own.
                        product = real * _vector(query, bands, bands_padded, step)
                        product += imaginary * _vector(query + turn, bands, bands_padded, step)
                        if OFFSETS == 1:
                            factor = _vector(weight + (first_head + head) * bands, bands, bands_padded, 1)
                            product += magnitude * factor
                        along += tl.sum(product, axis=1)
                    if rest > 0:
                        along += tl.sum(unrotated * _vector(query + ROTARY_DIM, rest, rest_padded, 1), axis=1)
                    best = tl.maximum(best, along, propagate_nan=tl.PropagateNan.ALL)
                    query += HEAD_DIM
                if (OFFSETS > 1) & (bands > 0):
                    factor = _vector(weight + (first_head + head) * bands, bands, bands_padded, 1)
                    best += tl.sum(magnitude * factor, axis=1)
                tl.store(scores + (first_head + head) * capacity + row, best, mask=inside)
        else:
            if POLICY == "key_norm":
                key = _row_tile(cache, row, inside, HEAD_DIM, triton.next_power_of_2(HEAD_DIM), HEAD_DIM)
                value = -tl.sqrt_rn(tl.sum(key * key, axis=1))
            if POLICY == "streaming":
                value = row.to(tl.float32)
            for head in tl.range(group, loop_unroll_factor=unrolled):
                if POLICY == "random":
                    value = _hash(tl.load(position + sequence), row, kv_head * group + head, layer)
                tl.store(scores + (first_head + head) * capacity + row, value, mask=inside)
