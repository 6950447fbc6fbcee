"""The four kernels of one model: their constants, sizes of work and grids. One place for all tuning."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.kernels.triton.score import score_kernel
from keysieve.kernels.triton.select import select_plan_kernel, select_stats_kernel
from keysieve.kernels.triton.update import update_kernel

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
TYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
ROWS_PER_PROGRAM = 256  # score: enough that centres and weights are a few per cent of what is read
TILE_ELEMENTS = 8192  # score: keys in registers at once, padding included; 32 for each of 256 threads
CHUNK_BYTES = 64  # update: what a program moves of each row; whole sectors, and four programs for a row of 256
MOVED_ROWS = 256  # update: rows that a program holds between reading and writing them
SELECT_ROWS = 1024  # select: rows a program looks at together


@dataclass(frozen=True)
class Grid:
    """Programs to launch: (ceil(C / rows) or x, y, z * B); `rows` is 0 where x does not depend on C."""

    rows: int
    x: int
    y: int
    z: int

    def of(self, batch: int, capacity: int) -> tuple[int, int, int]:
        """The grid for B = `batch` sequences and C = `capacity` rows."""
        return (-(-capacity // self.rows) if self.rows else self.x, self.y, self.z * batch)


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants; `parameters` are the names and Triton types of the others, in order."""

    name: str
    kernel: Any
    parameters: tuple[tuple[str, str], ...]
    constants: dict[str, Any]
    num_warps: int
    grid: Grid


def variants(model: KernelConfiguration) -> dict[str, Variant]:
    """score, select_stats, select_plan and update, specialised for `model`, by name."""
    return {variant.name: variant for variant in (_score(model), _stats(model), _plan(model), _update(model))}


def _score(model: KernelConfiguration) -> Variant:
    pairs, rest = model.rotary_dim // 2, model.head_dim - model.rotary_dim
    padded = 2 * triton.next_power_of_2(pairs) + triton.next_power_of_2(rest)
    tile = min(64, triton.next_power_of_2(TILE_ELEMENTS // padded + 1) // 2)
    parameters = "keys:*i64 centre:*fp32 weight:*fp32 length:*i32 limit:*i32 position:*i64 scores:*fp32 batch capacity"
    constants = {
        "QUERY_HEADS": model.query_heads,
        "KV_HEADS": model.kv_heads,
        "OFFSETS": model.offsets,
        "HEAD_DIM": model.head_dim,
        "ROTARY_DIM": model.rotary_dim,
        "INTERLEAVED": model.interleaved,
        "POLICY": model.policy,
        "DTYPE": TYPES[model.dtype],
        "BLOCK": ROWS_PER_PROGRAM,
        "TILE": tile,
    }
    grid = Grid(rows=ROWS_PER_PROGRAM, x=0, y=model.kv_heads, z=model.layers)
    return Variant("score", score_kernel, _typed(parameters), constants, 8, grid)


def _stats(model: KernelConfiguration) -> Variant:
    parameters = "scores:*fp32 length:*i32 limit:*i32 pinned:*i32 stats:*fp32 batch capacity"
    constants = {
        "QUERY_HEADS": model.query_heads,
        "SINKS": model.sinks,
        "RECENT": model.recent,
        "BLOCK": SELECT_ROWS,
    }
    grid = Grid(rows=0, x=model.query_heads, y=1, z=model.layers)
    return Variant("select_stats", select_stats_kernel, _typed(parameters), constants, 4, grid)


def _plan(model: KernelConfiguration) -> Variant:
    parameters = (
        "scores:*fp32 stats:*fp32 length:*i32 limit:*i32 budget:*i32 pinned:*i32 ranks:*u32 "
        "plan:*i32 keep:*i32 evicted:*i32 batch capacity"
    )
    constants = {
        "LAYERS": model.layers,
        "QUERY_HEADS": model.query_heads,
        "KV_HEADS": model.kv_heads,
        "SCOPE": model.scope,
        "SINKS": model.sinks,
        "RECENT": model.recent,
        "BLOCK": SELECT_ROWS,
    }
    grid = Grid(rows=0, x=model.plan_heads, y=1, z=model.plan_layers)
    return Variant("select_plan", select_plan_kernel, _typed(parameters), constants, 8, grid)


def _update(model: KernelConfiguration) -> Variant:
    cache = POINTERS[model.dtype]
    chunk = CHUNK_BYTES // (4 if model.dtype == "float32" else 2)
    parameters = (
        f"key_new:{cache} value_new:{cache} length:*i32 plan:*i32 keep:*i32 key:{cache} value:{cache} "
        "batch capacity tokens plan_layers layer"
    )
    constants = {
        "KV_HEADS": model.kv_heads,
        "PLAN_HEADS": model.plan_heads,
        "HEAD_DIM": model.head_dim,
        "VALUE_DIM": model.value_dim,
        "BLOCK": MOVED_ROWS,
        "CHUNK": chunk,
    }
    grid = Grid(rows=0, x=-(-max(model.head_dim, model.value_dim) // chunk), y=2 * model.kv_heads, z=1)
    return Variant("update", update_kernel, _typed(parameters), constants, 8, grid)


def _typed(parameters: str) -> tuple[tuple[str, str], ...]:
    """ "scores:*fp32 batch" -> (("scores", "*fp32"), ("batch", "i32"))."""
    pairs = (parameter.partition(":") for parameter in parameters.split())
    return tuple((name, kind or "i32") for name, _, kind in pairs)
