"""Turn scores into the ordered list of kept rows: the Triton form of `kernels.reference.select`.

Two launches: the statistics of every query head, then one program per plan, which ranks all rows, finds the
rank of the last row that stays by a search over its 32 bits, and lists the rows in ascending order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl

STD_FLOOR = tl.constexpr(1e-6)


@triton.jit
def _usable(scores, row, held, front, recent: tl.constexpr):
    """Score of the candidates among `row`, and which of them are candidates with a finite score."""
    candidate = (row >= front) & (row < held - recent)
    score = tl.load(scores + row, mask=candidate, other=float("inf"))
    return score, tl.abs(score) < float("inf")


@triton.jit(do_not_specialize=["batch", "capacity"])
def select_stats_kernel(
    scores,  # float32 [L, B, Hq, C]
    length,  # int32 [B]
    limit,  # int32 [B]
    pinned,  # int32 [B]
    stats,  # float32 [L, B, Hq, 4], written: highest score, mean below it, std, unused
    batch,
    capacity,
    QUERY_HEADS: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (Hq, 1, L * B)."""
    sequence = tl.program_id(2) % batch
    held = tl.load(length + sequence)
    if held < tl.load(limit + sequence):
        return
    front = tl.maximum(tl.load(pinned + sequence), SINKS)
    head = tl.program_id(2).to(tl.int64) * QUERY_HEADS + tl.program_id(0)
    scores += head * capacity
    stats += head * 4
    lane = tl.arange(0, BLOCK)

    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, held, BLOCK):
        score, usable = _usable(scores, start + lane, held, front, RECENT)
        highest = tl.maximum(highest, tl.where(usable, score, float("-inf")))
        count += usable.to(tl.int32)
    top = tl.max(highest, axis=0)
    number = tl.maximum(tl.sum(count, axis=0), 1).to(tl.float32)

    # Counted from the highest score, so that the mean of constant scores is exact.
    below = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, held, BLOCK):
        score, usable = _usable(scores, start + lane, held, front, RECENT)
        below += tl.where(usable, score - top, 0.0)
    mean = tl.math.div_rn(tl.sum(below, axis=0), number)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, held, BLOCK):
        score, usable = _usable(scores, start + lane, held, front, RECENT)
        centred = tl.where(usable, score - top - mean, 0.0)
        squares += centred * centred
    std = tl.sqrt_rn(tl.math.div_rn(tl.sum(squares, axis=0), number))

    tl.store(stats, top)
    tl.store(stats + 1, mean)
    tl.store(stats + 2, tl.maximum(std, STD_FLOOR, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _standardised(scores, stats, head, row, held, front, capacity, recent: tl.constexpr):
    """z of `row` in one head; -inf for a row that is no candidate or whose score is not finite."""
    score, usable = _usable(scores + head * capacity, row, held, front, recent)
    top, mean, std = tl.load(stats + head * 4), tl.load(stats + head * 4 + 1), tl.load(stats + head * 4 + 2)
    z = tl.math.div_rn(score - top - mean, std)
    return tl.where(usable & (tl.abs(z) < float("inf")), z, float("-inf"))


@triton.jit
def _ascending_bits(value):
    """Unsigned integers in the order of the float32 `value`; none is 0, and -0 equals 0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    sign = tl.full(bits.shape, 0x80000000, tl.uint32)
    return tl.where(bits < sign, bits | sign, ~bits)


@triton.jit(do_not_specialize=["batch", "capacity"])
def select_plan_kernel(
    scores,  # float32 [L, B, Hq, C]
    stats,  # float32 [L, B, Hq, 4], from select_stats_kernel
    length,  # int32 [B]
    limit,  # int32 [B]
    budget,  # int32 [B]
    pinned,  # int32 [B]
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
    BLOCK: tl.constexpr,
):
    """Grid (Hp, 1, Lp * B)."""
    plan_head = tl.program_id(0)
    cell = tl.program_id(2)  # plan layer * B + sequence
    sequence = cell % batch
    held = tl.load(length + sequence)
    due = held >= tl.load(limit + sequence)
    kept = tl.minimum(tl.load(budget + sequence), held)
    if (plan_head == 0) & (cell < batch):
        tl.store(keep + sequence, tl.where(due, kept, -1))
        tl.store(evicted + sequence, tl.where(due, held - kept, 0))
    if held < tl.load(limit + sequence):
        return

    group: tl.constexpr = QUERY_HEADS // KV_HEADS
    all_layers: tl.constexpr = SCOPE != "per_layer_per_head"
    all_heads: tl.constexpr = SCOPE == "union"
    plan_heads: tl.constexpr = 1 if all_heads else KV_HEADS
    layers: tl.constexpr = LAYERS if all_layers else 1
    heads: tl.constexpr = QUERY_HEADS if all_heads else group
    first_cell = sequence if all_layers else cell
    first_head = first_cell.to(tl.int64) * QUERY_HEADS + plan_head * group
    next_layer = batch.to(tl.int64) * QUERY_HEADS
    front = tl.maximum(tl.load(pinned + sequence), SINKS)
    offset = (cell * plan_heads + plan_head).to(tl.int64) * capacity
    ranks += offset
    plan += offset
    lane = tl.arange(0, BLOCK)

    # 1. Rank every row held: protected rows first, then by z, then those without a finite score.
    for start in range(0, held, BLOCK):
        row = start + lane
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for layer in range(layers):
            if SCOPE == "per_head":
                best = tl.full((BLOCK,), float("-inf"), tl.float32)
            for head in range(heads):
                z = _standardised(
                    scores, stats, first_head + layer * next_layer + head, row, held, front, capacity, RECENT
                )
                best = tl.maximum(best, z)
            total += best
        value = tl.math.div_rn(total, layers * 1.0) if SCOPE == "per_head" else best
        value = tl.where((row < front) | (row >= held - RECENT), float("inf"), value)
        tl.store(ranks + row, _ascending_bits(value), mask=row < held)
    tl.debug_barrier()

    # 2. The rank of the last row that stays is the highest one that at least `kept` rows reach.
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

    # 3. List the rows above the threshold and the lowest of those on it, in ascending order.
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
