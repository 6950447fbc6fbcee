"""What every finding pass returns: matches, and misses with layer, node and reason."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch.fx import Node

from keysieve.passes.rope_form import RopeForm

T = TypeVar("T")


@dataclass(frozen=True)
class Miss:
    """One thing that did not match: where, and why."""

    layer: int
    node: str
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer}, node {self.node}: {self.reason}"


@dataclass(frozen=True)
class Attention:
    """One attention node: query [B,Hq,S,D], key and value [B,Hkv,S,D]; window, chunk and softcap are 0 when absent.

    layer counts the attentions from 0; number is the model's own number of the layer, where not all have attention.
    heads: the KV heads of the layer that it is for, where split_heads made several of one, None where it has all;
    head_class: which budget their cache has (see split_heads).
    """

    layer: int
    number: int
    node: Node
    query: Node
    key: Node
    value: Node
    sinks: Node | None
    scale: float
    window: int
    chunk: int
    softcap: float
    heads: tuple[int, ...] | None = None
    head_class: int = 0

    @property
    def cache(self) -> str:
        """What ends the names of its cache: key_<cache> and value_<cache>."""
        return str(self.layer) if self.heads is None else f"{self.layer}_{self.head_class}"

    @property
    def evicts(self) -> bool:
        """Its cache grows with the text, so rows of it are evicted; the others hold their window and no more."""
        return not (self.window or self.chunk)

    @property
    def query_heads(self) -> int:
        return int(self.query.meta["val"].shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.key.meta["val"].shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.key.meta["val"].shape[3])

    @property
    def value_dim(self) -> int:
        return int(self.value.meta["val"].shape[3])


@dataclass(frozen=True)
class RopeAttention:
    """An attention whose rotary embedding was found and verified.

    q_proj -> (q_norm) -> [query_pre] -> RoPE -> [query_post] -> (norm) -> [query_normed] -> (scale by position)
           -> attention.query

    All three are 4-D, heads and sequence in the model's own order. Without a norm after RoPE query_normed is
    query_post; where form.kind is "nope" all three are one. arranged: query and key reach the attention in half-split
    order with the rotated dims first (see arrange_heads), whatever the form.
    """

    attention: Attention
    query_pre: Node
    query_post: Node
    query_normed: Node
    form: RopeForm
    arranged: bool = False


@dataclass
class Found(Generic[T]):
    """The result of a finding pass."""

    matches: list[T]
    misses: list[Miss] = field(default_factory=list)
