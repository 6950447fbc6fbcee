"""Bytes that the kernels move between an SM and the rest of the GPU in one eviction round, and the least possible.

What a program reads again is in its L1 cache and counts once; what two programs read counts twice, though the
second may find it in L2. Sectors that a program touches in part are not rounded up.
"""

from dataclasses import dataclass

from keysieve.kernels.triton import attend_variant
from keysieve.kernels.triton.configuration import KernelConfiguration, needs_stats
from keysieve.kernels.triton.variants import CHUNK_BYTES, ELEMENT, ROWS_PER_PART

FLOAT = 4  # bytes of a score, a rank, a row number


@dataclass(frozen=True)
class Round:
    """One eviction of `batch` sequences with `rows` rows held, `budget` kept, of which `moved` change place."""

    rows: int
    budget: int
    moved: int
    capacity: int
    batch: int = 1
    tokens: int = 1


@dataclass(frozen=True)
class Traffic:
    """Launches of a kernel in one round, and the bytes they read and write."""

    name: str
    launches: int
    read: int
    written: int


def minimum(model: KernelConfiguration, work: Round) -> int:
    """Bytes that any implementation moves: every key read once, every moved row read and written once."""
    heads = model.layers * work.batch * model.kv_heads
    element = ELEMENT[model.dtype]
    return heads * element * (work.rows * model.head_dim + 2 * work.moved * (model.head_dim + model.value_dim))


def traffic(model: KernelConfiguration, work: Round) -> list[Traffic]:
    """score and select's kernels in the step that plans, and all updates of the step that executes."""
    element = ELEMENT[model.dtype]
    cells = model.layers * work.batch
    keys = cells * model.kv_heads * work.rows * model.head_dim * element
    per_head = FLOAT * (model.offsets * model.head_dim + model.rotary_dim // 2)
    query = cells * model.query_heads * -(-work.rows // ROWS_PER_PART) * per_head
    if model.policy != "trig":
        query = 0
    if model.policy in ("streaming", "random"):
        keys = 0
    scores = cells * model.query_heads * work.rows * FLOAT
    candidates = cells * model.query_heads * (work.rows - model.sinks - model.recent) * FLOAT
    stats = cells * model.query_heads * 3 * FLOAT
    plans = model.plan_layers * work.batch * model.plan_heads
    ranks = plans * work.rows * FLOAT
    chunks = sum(-(-dim * element // CHUNK_BYTES) for dim in (model.head_dim, model.value_dim))
    plan_read = cells * model.kv_heads * chunks * work.budget * FLOAT
    moved = cells * model.kv_heads * (work.moved + work.tokens) * (model.head_dim + model.value_dim) * element
    found = [Traffic("score", 1, keys + query, scores)]
    if needs_stats(model.scope):
        found.append(Traffic("select_stats", 1, candidates, stats))
    else:
        stats = 0
    return [
        *found,
        Traffic("select_plan", 1, candidates + stats + ranks, ranks + plans * work.capacity * FLOAT),
        Traffic("update", model.layers, plan_read + moved, moved),
    ]


def held(model: KernelConfiguration, batch: int, rows: int) -> int:
    """Bytes of the keys and values of one layer: the least that its attention reads."""
    return batch * model.kv_heads * rows * (model.head_dim + model.value_dim) * ELEMENT[model.dtype]


def attention(model: KernelConfiguration, batch: int, rows: int, capacity: int, processors: int) -> Traffic:
    """The attention of one layer, for one token of each of `batch` sequences that hold `rows` rows."""
    sizes = (model.query_heads, model.kv_heads, model.head_dim, model.value_dim, model.dtype)
    work = attend_variant.attend(batch, 1, capacity, *sizes, processors)
    shares = attend_variant.shares(work, rows)
    cells = batch * model.kv_heads
    query, out = (cells * model.group * dim * ELEMENT[model.dtype] for dim in (model.head_dim, model.value_dim))
    parts = cells * shares * model.group * (model.value_dim + 2) * FLOAT if shares > 1 else 0
    seen = cells * shares * 8  # the last row that each program may see
    return Traffic("attend", 1, held(model, batch, rows) + shares * query + seen + parts, out + parts)
