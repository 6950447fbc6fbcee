"""The attention kernel for given shapes, and how many programs share its rows: one place for its tuning.

Everything follows from shapes and the GPU, never from how many rows are held, so that a launch can be captured in a
CUDA graph and replayed while sequences grow.
"""

from dataclasses import dataclass
from functools import lru_cache

import triton

from keysieve.kernels.triton.attend import attend_kernel
from keysieve.kernels.triton.configuration import ATTEND_REGISTERS, check_dims, check_heads
from keysieve.kernels.triton.variants import POINTERS, Grid, Variant, typed

DECODE_TOKENS = 16  # rows of queries, token by head, up to which a tile has as many as tensor cores take at least
PROMPT_TILE = 64  # else
DECODE_BYTES = 32768  # keys and values in one tile; two tiles are on their way
PROMPT_BYTES = 16384
PER_PROCESSOR = 2  # programs of a processor that should have work at once
# Each program of several that share a tile of queries reads at least so many rows, which are many more bytes than
# what it leaves behind for the last one of them.
DECODE_ROWS, PROMPT_ROWS = 128, 512
PART_ELEMENTS = 8192  # of what the others left behind, looked at together


@dataclass(frozen=True)
class Work:
    """A kernel, and the programs that share the rows of one tile of queries; `tiles` of each sequence and KV head.

    `part` is how many rows of queries a tile leaves behind at most.
    """

    variant: Variant
    splits: int
    tiles: int
    part: int


def shares(work: Work, rows: int) -> int:
    """Among how many programs the rows that a tile of queries sees are shared, as the kernel counts them."""
    share = max(-(-rows // work.splits), work.variant.constants["MIN_ROWS"])
    return -(-rows // share)


@lru_cache(maxsize=512)
def attend(
    batch: int,
    tokens: int,
    capacity: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    processors: int,
    windowed: bool = False,
    sinks: bool = False,
    softcap: float = 0.0,
) -> Work:
    """For S tokens of B sequences, and a cache of C rows. Raises ConfigError where the kernel cannot be built."""
    check_dims(dtype, head_dim=head_dim, value_dim=value_dim)
    check_heads(query_heads, kv_heads, most=query_heads)
    group = query_heads // kv_heads
    rows = group * tokens
    row_bytes = 2 * triton.next_power_of_2(head_dim + value_dim)
    # Products of float32 without tensor cores take many registers.
    decodes = rows <= DECODE_TOKENS or dtype == "float32"
    tile = DECODE_TOKENS if decodes else PROMPT_TILE
    if dtype == "float32":
        block, warps, stages = 16, 8, 2
    elif decodes:
        block, warps, stages = min(128, DECODE_BYTES // row_bytes), 4, 3
    elif row_bytes <= 512:
        block, warps, stages = min(64, PROMPT_BYTES // row_bytes), 4, 3
    else:
        block, warps, stages = 32, 8, 2
    tiles = -(-rows // tile)
    least = DECODE_ROWS if rows <= DECODE_TOKENS else PROMPT_ROWS
    wanted = PER_PROCESSOR * processors // (batch * kv_heads * tiles) if rows and batch else 1
    splits = max(1, min(wanted, -(-capacity // least)))
    part = min(tile, triton.next_power_of_2(max(rows, 1)))
    cache = POINTERS[dtype]
    # Other integers than these may say what is seen, and other floats the sinks; so tests build it.
    parameters = (
        f"query:{cache} key:{cache} value:{cache} first:*i64 last:*i64 sinks:{cache} out:{cache} parts:*fp32 "
        "weights:*fp32 arrived:*i32 scale:fp32 capacity tokens splits query_sequence query_head query_token"
    )
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "WINDOWED": windowed,
        "SINKS": sinks,
        "SOFTCAP": softcap,
        "SPLIT": splits > 1,
        "BLOCK_M": tile,
        "PART_M": part,
        "BLOCK_N": block,
        "STAGES": stages,
        "MIN_ROWS": least,
        "PARTS_AT_ONCE": max(1, PART_ELEMENTS // (part * triton.next_power_of_2(value_dim))),
    }
    grid = Grid(kv_heads * tiles * splits)
    variant = Variant("attend", attend_kernel, typed(parameters), constants, warps, grid, ATTEND_REGISTERS)
    return Work(variant, splits, tiles, part)
