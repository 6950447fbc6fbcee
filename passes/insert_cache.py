"""insert_cache: attention over a cache that is the engine's state, one graph for prefill and decode.

    query, key, value -> attention
becomes
    key, value, key_l, value_l, plan -> update -> key_l', value_l'     (compacts by the plan, then appends)
    query, key_l', value_l', mask    -> attend

position_ids is replaced by position [B] + arange(S); the mask lets token s of a sequence see the rows held before
this step and the rows of this step up to its own.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from keysieve.errors import MatchError
from keysieve.passes.graph import Graph
from keysieve.passes.result import Attention
from keysieve.plugins.contract import plan_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Cache:
    """Nodes that insert_eviction builds on.

    positions [B,S] int64; position [B] int64 = T, the absolute position after this step's tokens;
    count, length (rows held after the append) [B] int32; keys: one [B,Hkv,C,D] a layer.
    """

    positions: Node
    position: Node
    count: Node
    length: Node
    keys: list[Node]


def insert_cache(graph: Graph, attentions: list[Attention], scope: str) -> Cache:
    """Add the inputs count, position, length, plan, keep, key_<l>, value_<l>; outputs of the same names end in _next.

    Raises MatchError where layers have different shapes (they share one score and one select node).
    """
    _check_equal_shapes(attentions)
    first = attentions[0]
    batch = graph.shape(graph.inputs["input_ids"])[0]
    capacity = graph.symbol("C")
    dtype = first.key.meta["val"].dtype
    count = graph.input("count", (batch,), torch.int32)
    position = graph.input("position", (batch,), torch.int64)
    length = graph.input("length", (batch,), torch.int32)
    plan = graph.input("plan", plan_shape(scope, len(attentions), batch, first.kv_heads, capacity), torch.int32)
    keep = graph.input("keep", (batch,), torch.int32)
    caches = []
    for attention in attentions:
        key = graph.input(f"key_{attention.layer}", (batch, first.kv_heads, capacity, first.head_dim), dtype)
        value = graph.input(f"value_{attention.layer}", (batch, first.kv_heads, capacity, first.value_dim), dtype)
        caches.append((key, value))

    call = graph.call
    old_positions = graph.inputs["position_ids"]
    with graph.before(graph.first_call()):
        token_count = graph.size(graph.inputs["input_ids"], 1)
        steps = call(aten.arange.default, token_count, dtype=torch.int64)
        positions = call(aten.add.Tensor, call(aten.unsqueeze.default, position, 1), steps)
        planned = call(aten.ge.Scalar, keep, 0)
        start = call(aten.where.self, planned, keep, length)
        held = call(aten.add.Tensor, start, count)
        end = call(aten.add.Tensor, position, count)
        rows = call(aten.arange.default, graph.size(caches[0][0], 2), dtype=torch.int64)
        newest = call(aten.add.Tensor, call(aten.unsqueeze.default, start, 1), steps)  # [B,S]: the row of each token
        mask = call(aten.le.Tensor, rows, call(aten.unsqueeze.default, newest, 2))  # [B,S,C]
        mask = call(aten.unsqueeze.default, mask, 1)
    old_positions.replace_all_uses_with(positions)
    graph.remove(old_positions)

    keys = []
    for index, (attention, (key, value)) in enumerate(zip(attentions, caches, strict=True)):
        node = attention.node
        with graph.before(node):
            updated = call(
                torch.ops.keysieve.update.default,
                attention.key, attention.value, length, plan, keep, key, value, index,
            )  # fmt: skip
            key_next, value_next = graph.item(updated, 0), graph.item(updated, 1)
            attend = call(
                torch.ops.keysieve.attend.default, attention.query, key_next, value_next, mask, attention.scale
            )
        node.replace_all_uses_with(attend)
        graph.fx.erase_node(node)
        graph.outputs[f"{key.name}_next"] = key_next
        graph.outputs[f"{value.name}_next"] = value_next
        keys.append(key_next)
    graph.outputs["length_next"] = held
    return Cache(positions, end, count, held, keys)


def _check_equal_shapes(attentions: list[Attention]) -> None:
    first = attentions[0]
    for other in attentions[1:]:
        for what in ("query_heads", "kv_heads", "head_dim", "value_dim"):
            if getattr(first, what) != getattr(other, what):
                raise MatchError(
                    f"layer {other.number} has {what} {getattr(other, what)}, layer {first.number} has "
                    f"{getattr(first, what)}: layers of different shapes are not supported yet"
                )
