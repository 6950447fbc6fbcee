"""The sizes that are measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Of the layers that evict: L, Hq, Hkv, D and the dtype of keys and values; rows before and after a round."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    rows: int
    budget: int
    sinks: int = 4
    recent: int = 128

    @property
    def capacity(self) -> int:
        return self.rows + 128

    def row_bytes(self) -> int:
        """Of keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)


QWEN3_8B = Shape(36, 32, 8, 128, "bfloat16", rows=2176, budget=2048)
TINY = Shape(2, 4, 2, 16, "float32", rows=32, budget=24, sinks=2, recent=4)

BATCHES = 1, 8, 32
HISTORIES = 2176, 8192, 32768  # rows held while decoding
