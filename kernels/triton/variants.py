"""The kernels with their constants, sizes of work and grids. One place for all tuning.

Each function makes one kernel for what one node says of itself, so that a node can be launched without a model;
`attend_variant` has the kernel of the attention.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from keysieve.kernels.triton.configuration import (
    MAX_REGISTERS,
    KernelConfiguration,
    check_dims,
    check_heads,
    check_scope,
    check_scoring,
    needs_stats,
)
from keysieve.kernels.triton.score import score_kernel
from keysieve.kernels.triton.select import select_plan_kernel, select_stats_kernel
from keysieve.kernels.triton.update import update_kernel
from keysieve.kernels.triton.update_numbers import update_numbers_kernel

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
TYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
ELEMENT = {"float16": 2, "bfloat16": 2, "float32": 4}
# Most programs of a kernel that looks for what is due; an idle step costs about a nanosecond for each. All of them run
# at once on the 132 processors of an H100.
PROGRAMS = {"score": 264, "select_stats": 528, "select_plan": 528}
ROWS_PER_PART = 256  # score: enough that centres and weights are a few per cent of what is read
TILE_ELEMENTS = 8192  # score: keys in registers at once, padding included; 32 for each of 256 threads
CHUNK_BYTES = 64  # update: what a program moves of each row; whole sectors, and four programs for a row of 256
SMALL_CHUNK_BYTES = 32  # the same, where there would be fewer programs than processors
TILE_BYTES = 16384  # update: what a program reads before it writes; 64 for each of 256 threads, twice
NUMBERS = 512  # update_numbers: rows a program moves together
SELECT_ROWS = 1024  # select: rows a program looks at together
GROUP_ELEMENTS = 2048  # select: scores of a group of query heads that it looks at together; 8 for each thread
LIMIT = 2**31 - 1  # of programs in a grid


@dataclass(frozen=True)
class Grid:
    """Programs to launch for B sequences and C rows: min(most, cells * B * ceil(C / rows)); `rows` 0 counts as one."""

    cells: int
    rows: int = 0
    most: int = LIMIT

    def of(self, batch: int, capacity: int) -> tuple[int]:
        return (min(self.most, self.cells * batch * (-(-capacity // self.rows) if self.rows else 1)),)


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants; `parameters` are the names and Triton types of the others, in order."""

    name: str
    kernel: Any
    parameters: tuple[tuple[str, str], ...]
    constants: dict[str, Any]
    num_warps: int
    grid: Grid
    max_registers: int = MAX_REGISTERS


def variants(model: KernelConfiguration) -> dict[str, Variant]:
    """score, select_stats (where the scope needs it), select_plan and update, specialised for `model`, by name."""
    m = model
    chosen = (m.layers, m.query_heads, m.kv_heads, m.sinks, m.recent)
    found = [
        score(
            m.layers, m.query_heads, m.kv_heads, m.head_dim, m.offsets, m.rotary_dim, m.interleaved, m.policy, m.dtype
        ),
        *([select_stats(*chosen)] if needs_stats(m.scope) else []),
        select_plan(*chosen, m.scope),
        update(m.kv_heads, m.plan_heads, m.head_dim, m.value_dim, m.dtype),
    ]
    return {variant.name: variant for variant in found}


@lru_cache
def score(
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    offsets: int,
    rotary_dim: int,
    interleaved: bool,
    policy: str,
    dtype: str,
) -> Variant:
    """Raises ConfigError where the kernel cannot be built."""
    check_dims(dtype, head_dim=head_dim)
    check_scoring(query_heads, kv_heads, head_dim, rotary_dim, policy)
    pairs, rest = rotary_dim // 2, head_dim - rotary_dim
    padded = 2 * triton.next_power_of_2(pairs) + triton.next_power_of_2(rest)
    tile = min(64, triton.next_power_of_2(TILE_ELEMENTS // padded + 1) // 2)
    parameters = "keys:*i64 centre:*fp32 weight:*fp32 length:*i32 limit:*i32 position:*i64 scores:*fp32 batch capacity"
    constants = {
        "LAYERS": layers,
        "QUERY_HEADS": query_heads,
        "KV_HEADS": kv_heads,
        "OFFSETS": offsets,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "POLICY": policy,
        "DTYPE": TYPES[dtype],
        "BLOCK": ROWS_PER_PART,
        "TILE": tile,
        "PREFETCH": not triton.knobs.runtime.interpret and policy not in ("streaming", "random"),
    }
    grid = Grid(layers * kv_heads, ROWS_PER_PART, PROGRAMS["score"])
    return Variant("score", score_kernel, typed(parameters), constants, 8, grid)


@lru_cache
def select_stats(layers: int, query_heads: int, kv_heads: int, sinks: int, recent: int) -> Variant:
    """Raises ConfigError where the kernel cannot be built."""
    check_heads(query_heads, kv_heads)
    parameters = "scores:*fp32 length:*i32 limit:*i32 pinned:*i32 stats:*fp32 batch capacity"
    constants = {
        "LAYERS": layers,
        "QUERY_HEADS": query_heads,
        "KV_HEADS": kv_heads,
        "SINKS": sinks,
        "RECENT": recent,
        "BLOCK": _group_rows(query_heads // kv_heads),
    }
    grid = Grid(layers * kv_heads, most=PROGRAMS["select_stats"])
    return Variant("select_stats", select_stats_kernel, typed(parameters), constants, 8, grid)


@lru_cache
def select_plan(
    layers: int, query_heads: int, kv_heads: int, sinks: int, recent: int, scope: str, utility: bool = False
) -> Variant:
    """Raises ConfigError where the kernel cannot be built."""
    check_heads(query_heads, kv_heads)
    check_scope(scope)
    parameters = (
        "scores:*fp32 stats:*fp32 length:*i32 limit:*i32 budget:*i32 pinned:*i32 utility:*fp32 ranks:*u32 "
        "plan:*i32 keep:*i32 evicted:*i32 batch capacity"
    )
    constants = {
        "LAYERS": layers,
        "QUERY_HEADS": query_heads,
        "KV_HEADS": kv_heads,
        "SCOPE": scope,
        "SINKS": sinks,
        "RECENT": recent,
        "UTILITY": utility,
        "BLOCK": SELECT_ROWS,
        "GROUP_BLOCK": _group_rows(query_heads // kv_heads),
    }
    plans = (layers if scope == "per_layer_per_head" else 1) * (1 if scope == "union" else kv_heads)
    return Variant(
        "select_plan", select_plan_kernel, typed(parameters), constants, 8, Grid(plans, most=PROGRAMS["select_plan"])
    )


def _group_rows(group: int) -> int:
    return min(SELECT_ROWS, GROUP_ELEMENTS // triton.next_power_of_2(group))


@lru_cache
def update(
    kv_heads: int, plan_heads: int, head_dim: int, value_dim: int, dtype: str, chunk_bytes: int = CHUNK_BYTES
) -> Variant:
    """Raises ConfigError where the kernel cannot be built."""
    check_dims(dtype, head_dim=head_dim, value_dim=value_dim)
    cache = POINTERS[dtype]
    strides = " ".join(f"{name}_{axis}" for name in ("key", "value") for axis in ("sequence", "head", "token"))
    parameters = (
        f"key_new:{cache} value_new:{cache} length:*i32 plan:*i32 keep:*i32 key:{cache} value:{cache} "
        f"batch capacity tokens plan_layers layer {strides}"
    )
    rows = TILE_BYTES // chunk_bytes
    constants = {
        "KV_HEADS": kv_heads,
        "PLAN_HEADS": plan_heads,
        "KEY_WORDS": head_dim * ELEMENT[dtype] // 4,
        "VALUE_WORDS": value_dim * ELEMENT[dtype] // 4,
        "PER_WORD": 4 // ELEMENT[dtype],
        "BLOCK": rows,
        "EARLY": rows // 4,  # one read of 16 bytes for each thread
        "CHUNK": chunk_bytes // 4,
    }
    chunks = -(-max(head_dim, value_dim) * ELEMENT[dtype] // chunk_bytes)
    return Variant("update", update_kernel, typed(parameters), constants, 8, Grid(chunks * 2 * kv_heads))


@lru_cache
def update_numbers(kv_heads: int, plan_heads: int) -> Variant:
    """Of caches with rows of one float32."""
    parameters = (
        "key_new:*fp32 value_new:*fp32 length:*i32 plan:*i32 keep:*i32 key:*fp32 value:*fp32 "
        "batch capacity tokens plan_layers layer"
    )
    constants = {"KV_HEADS": kv_heads, "PLAN_HEADS": plan_heads, "BLOCK": NUMBERS}
    return Variant("update_numbers", update_numbers_kernel, typed(parameters), constants, 4, Grid(2 * kv_heads))


def typed(parameters: str) -> tuple[tuple[str, str], ...]:
    """ "scores:*fp32 batch" -> (("scores", "*fp32"), ("batch", "i32"))."""
    pairs = (parameter.partition(":") for parameter in parameters.split())
    return tuple((name, kind or "i32") for name, _, kind in pairs)
