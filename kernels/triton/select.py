"""Turn scores into the ordered list of kept rows: the Triton form of `kernels.reference.select`.

One program a plan ranks all rows, finds the rank of the last row that stays by a search over its 32 bits, and lists the
rows in ascending order. Where a plan has the query heads of one KV head alone, its program begins with their
statistics; else these are a launch of their own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl

from keysieve.kernels.triton.due import SEQUENCES, any_due, rounds

STD_FLOOR = tl.constexpr(1e-6)


@triton.jit
def _candidates(scores, head, row, held, front, capacity, group: tl.constexpr, recent: tl.constexpr):
    """Scores [heads, rows] of the `group` heads from `head`, and which are finite and of a row that may go."""
    lane = tl.arange(0, triton.next_power_of_2(group))
    candidate = (lane < group)[:, None] & ((row >= front) & (row < held - recent))[None, :]
    score = tl.load(scores + (head + lane)[:, None] * capacity + row[None, :], mask=candidate, other=float("inf"))
    return score, tl.abs(score) < float("inf")


@triton.jit
def _statistics(scores, head, held, front, capacity, group: tl.constexpr, recent: tl.constexpr, block: tl.constexpr):
    """Of each of the `group` heads from `head`: the highest score, the mean below it, the standard deviation."""
    heads: tl.constexpr = triton.next_power_of_2(group)
    lane = tl.arange(0, block)
    highest = tl.full((heads, block), float("-inf"), tl.float32)
    count = tl.zeros((heads, block), tl.int32)
    for start in range(0, held, block):
        score, usable = _candidates(scores, head, start + lane, held, front, capacity, group, recent)
        highest = tl.maximum(highest, tl.where(usable, score, float("-inf")))
        count += usable.to(tl.int32)
    top = tl.max(highest, axis=1)
    number = tl.maximum(tl.sum(count, axis=1), 1).to(tl.float32)

    # Counted from the highest score, so that the mean of constant scores is exact.
    below = tl.zeros((heads, block), tl.float32)
    for start in range(0, held, block):
        score, usable = _candidates(scores, head, start + lane, held, front, capacity, group, recent)
        below += tl.where(usable, score - top[:, None], 0.0)
    mean = tl.math.div_rn(tl.sum(below, axis=1), number)

    squares = tl.zeros((heads, block), tl.float32)
    for start in range(0, held, block):
        score, usable = _candidates(scores, head, start + lane, held, front, capacity, group, recent)
        centred = tl.where(usable, score - top[:, None] - mean[:, None], 0.0)
        squares += centred * centred
    std = tl.sqrt_rn(tl.math.div_rn(tl.sum(squares, axis=1), number))
    return top, mean, tl.maximum(std, STD_FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["batch", "capacity"])
def select_stats_kernel(
    scores,  # float32 [L, B, Hq, C]
    length,  # int32 [B]
    limit,  # int32 [B]
    pinned,  # int32 [B]
    stats,  # float32 [L, B, Hq, 4], written: highest score, mean below it, std, unused
    batch,
    capacity,
    LAYERS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (any number of programs): they share the KV heads of all layers of what is due."""
    if not any_due(length, limit, batch):
        return
    group: tl.constexpr = QUERY_HEADS // KV_HEADS
    parts: tl.constexpr = LAYERS * KV_HEADS
    part = tl.program_id(0)
    for sequence in range(batch):
        held = tl.load(length + sequence)
        if held >= tl.load(limit + sequence):
            front = tl.maximum(tl.load(pinned + sequence), SINKS)
            mine = rounds(part, parts)
            for turn in range(mine):
                one = part + turn * tl.num_programs(0)
                cell = one // KV_HEADS * batch + sequence  # layer * B + sequence
                head = cell.to(tl.int64) * QUERY_HEADS + one % KV_HEADS * group
                top, mean, std = _statistics(scores, head, held, front, capacity, group, RECENT, BLOCK)
                lane = tl.arange(0, triton.next_power_of_2(group))
                tl.store(stats + (head + lane) * 4, top, mask=lane < group)
                tl.store(stats + (head + lane) * 4 + 1, mean, mask=lane < group)
                tl.store(stats + (head + lane) * 4 + 2, std, mask=lane < group)
            part += mine * tl.num_programs(0) - parts


@triton.jit
def _known_statistics(stats, head, group: tl.constexpr):
    """What `select_stats_kernel` wrote for the `group` heads from `head`."""
    lane = tl.arange(0, triton.next_power_of_2(group))
    top = tl.load(stats + (head + lane) * 4, mask=lane < group, other=0.0)
    mean = tl.load(stats + (head + lane) * 4 + 1, mask=lane < group, other=0.0)
    return top, mean, tl.load(stats + (head + lane) * 4 + 2, mask=lane < group, other=1.0)


@triton.jit
def _best(score, usable, top, mean, std):
    """The highest z of each row [rows]; -inf for a row that may not go or has no finite score."""
    z = tl.math.div_rn(score - top[:, None] - mean[:, None], std[:, None])
    return tl.max(tl.where(usable & (tl.abs(z) < float("inf")), z, float("-inf")), axis=0)


@triton.jit
def _ascending_bits(value):
    """Unsigned integers in the order of the float32 `value`; none is 0, and -0 equals 0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    sign = tl.full(bits.shape, 0x80000000, tl.uint32)
    return tl.where(bits < sign, bits | sign, ~bits)


@triton.jit(do_not_specialize=["batch", "capacity"])
def select_plan_kernel(
    scores,  # float32 [L, B, Hq, C]
    stats,  # float32 [L, B, Hq, 4], from select_stats_kernel; not read where plans are per_layer_per_head
    length,  # int32 [B]
    limit,  # int32 [B]
    budget,  # int32 [B]
    pinned,  # int32 [B]
    utility,  # float32 [L, B, Hkv, C]; not read without UTILITY
    ranks,  # uint32 [Lp, B, Hp, C], workspace
    plan,  # int32 [Lp, B, Hp, C], written for sequences that are due
    keep,  # int32 [B], written
    evicted,  # int32 [B], written
    batch,
    capacity,
    LAYERS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SCOPE: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    UTILITY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """Grid (any number of programs): they share the plans of what is due; the first writes keep and evicted."""
    if tl.program_id(0) == 0:
        for first in range(0, batch, SEQUENCES):
            lane = first + tl.arange(0, SEQUENCES)
            known = lane < batch
            held = tl.load(length + lane, mask=known, other=0)
            due = held >= tl.load(limit + lane, mask=known, other=1)
            kept = tl.minimum(tl.load(budget + lane, mask=known, other=0), held)
            tl.store(keep + lane, tl.where(due, kept, -1), mask=known)
            tl.store(evicted + lane, tl.where(due, held - kept, 0), mask=known)
    if not any_due(length, limit, batch):
        return
    plan_heads: tl.constexpr = 1 if SCOPE == "union" else KV_HEADS
    plans: tl.constexpr = LAYERS * plan_heads if SCOPE == "per_layer_per_head" else plan_heads
    part = tl.program_id(0)
    for sequence in range(batch):
        held = tl.load(length + sequence)
        if held >= tl.load(limit + sequence):
            front = tl.maximum(tl.load(pinned + sequence), SINKS)
            kept = tl.minimum(tl.load(budget + sequence), held)
            mine = rounds(part, plans)
            for turn in range(mine):
                one = part + turn * tl.num_programs(0)
                cell = one // plan_heads * batch + sequence  # plan layer * B + sequence
                offset = (cell * plan_heads + one % plan_heads).to(tl.int64) * capacity
                _rank(
                    scores, stats, utility, ranks + offset, batch, capacity, held, front, cell, one % plan_heads,
                    LAYERS, QUERY_HEADS, KV_HEADS, SCOPE, RECENT, UTILITY, GROUP_BLOCK,
                )  # fmt: skip
                tl.debug_barrier()
                _list(ranks + offset, plan + offset, capacity, held, kept, BLOCK)
            part += mine * tl.num_programs(0) - plans


@triton.jit
def _rank(
    scores, stats, utility, ranks, batch, capacity, held, front, cell, plan_head,
    LAYERS: tl.constexpr, QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SCOPE: tl.constexpr, RECENT: tl.constexpr,
    UTILITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the rank of every row held: protected rows first, then by z, then those without a finite score."""
    group: tl.constexpr = QUERY_HEADS // KV_HEADS
    one_group: tl.constexpr = SCOPE == "per_layer_per_head"
    layers: tl.constexpr = 1 if one_group else LAYERS
    groups: tl.constexpr = KV_HEADS if SCOPE == "union" else 1
    first_head = cell.to(tl.int64) * QUERY_HEADS + plan_head * group
    next_layer = batch.to(tl.int64) * QUERY_HEADS
    if one_group:
        top, mean, std = _statistics(scores, first_head, held, front, capacity, group, RECENT, BLOCK)
    for start in range(0, held, BLOCK):
        row = start + tl.arange(0, BLOCK)
        value = tl.full((BLOCK,), 0.0 if SCOPE == "per_head" else float("-inf"), tl.float32)
        for layer in range(layers):
            for other in range(groups):
                head = first_head + layer * next_layer + other * group
                score, usable = _candidates(scores, head, row, held, front, capacity, group, RECENT)
                if not one_group:
                    top, mean, std = _known_statistics(stats, head, group)
                best = _best(score, usable, top, mean, std)
                if UTILITY:
                    more = tl.load(utility + head // group * capacity + row, mask=row < held, other=0.0)
                    best = tl.where(tl.abs(best + more) < float("inf"), best + more, float("-inf"))
                value = value + best if SCOPE == "per_head" else tl.maximum(value, best)
        if SCOPE == "per_head":
            value = tl.math.div_rn(value, layers * 1.0)
        value = tl.where((row < front) | (row >= held - RECENT), float("inf"), value)
        tl.store(ranks + row, _ascending_bits(value), mask=row < held)


@triton.jit
def _list(ranks, plan, capacity, held, kept, BLOCK: tl.constexpr):
    """Write the `kept` rows of the highest ranks in ascending order, and zeros behind them."""
    # The rank of the last row that stays is the highest one that at least `kept` rows reach.
    lane = tl.arange(0, BLOCK)
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    above = 0
    for _ in range(32):
        candidate = threshold | bit
        reaching = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, held, BLOCK):
            row = start + lane
            rank = tl.load(ranks + row, mask=row < held, other=0)
            reaching += (rank >= candidate).to(tl.int32)
        count = tl.sum(reaching, axis=0)
        # The last rank that too few rows reach is the one right above the threshold.
        above = tl.where(count >= kept, above, count)
        threshold = tl.where(count >= kept, candidate, threshold)
        bit = bit >> 1

    # All rows above the threshold stay, and the lowest of those on it.
    ties_kept = kept - above
    higher_before = 0
    ties_before = 0
    for start in range(0, held, BLOCK):
        row = start + lane
        rank = tl.load(ranks + row, mask=row < held, other=0)
        higher, tie = (rank > threshold).to(tl.int32), ((rank == threshold) & (row < held)).to(tl.int32)
        counted = tl.cumsum(higher + (tie << 16), axis=0)  # both counts in one scan: a block has < 65536 rows
        higher_upto = higher_before + (counted & 0xFFFF)
        ties_upto = ties_before + (counted >> 16)
        stays = (higher == 1) | ((tie == 1) & (ties_upto <= ties_kept))
        tl.store(plan + higher_upto + tl.minimum(ties_upto, ties_kept) - 1, row, mask=stays)
        higher_before += tl.sum(higher, axis=0)
        ties_before += tl.sum(tie, axis=0)
    for start in range(kept, capacity, BLOCK):
        row = start + lane
        tl.store(plan + row, tl.zeros((BLOCK,), tl.int32), mask=row < capacity)
