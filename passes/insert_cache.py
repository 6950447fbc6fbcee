"""insert_cache: attention over a cache that is the engine's state, one graph for prefill and decode.

    query, key, value -> attention
becomes
    key, value, key_l, value_l, plan -> update -> key_l', value_l'     (compacts by the plan, then appends)
    query, key_l', value_l', mask    -> attend

position_ids is replaced by position [B] + arange(S); the mask lets token s of a sequence see the rows held before
this step and the rows of this step up to its own.

A layer with full attention executes the plan of the last step, which it shares with the layers of its shape. One with
a sliding window (or chunks) of W tokens follows a plan of its own, made in the same step: when the new tokens find no
room, the last W - 1 rows move to the front, which are all that any later token can see. So its cache holds consecutive
tokens, and the result is exact.
"""

from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group
from keysieve.passes.mask_span import Span
from keysieve.passes.result import Attention
from keysieve.plugins.contract import plan_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """Layers of one shape that see no further back than `span`; they share the input window_length_<index>."""

    span: Span
    kv_heads: int
    layers: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """W: tokens that a token sees at most, itself included."""
        return self.span.window or self.span.chunk


@dataclass(frozen=True)
class Cache:
    """Nodes that insert_eviction builds on.

    positions [B,S] int64; position [B] int64 = T, the absolute position after this step's tokens; count [B] int32;
    length (rows held after the append) [B] int32 of the layers that evict, None where no layer does; keys: one
    [B,Hkv,C,D] a layer, by group; windows: the layers that evict nothing.
    """

    positions: Node
    position: Node
    count: Node
    length: Node | None
    keys: list[list[Node]]
    windows: list[Window]


@dataclass(frozen=True)
class _Rows:
    """What the caches of some layers have in common: where rows go, and which of them the new tokens see.

    length, plan and keep as `update` takes them; held [B]: rows after the append; mask [B,1,S,C] bool.
    """

    length: Node
    plan: Node
    keep: Node
    held: Node
    mask: Node


def group_windows(attentions: list[Attention]) -> list[Window]:
    """The windows of a model, in the order of their first layers."""
    windows: dict[tuple[Span, int], Window] = {}
    for attention in attentions:
        if not attention.evicts:
            kind = Span(attention.window, attention.chunk), attention.kv_heads
            windows.setdefault(kind, Window(*kind)).layers.append(attention.layer)
    return list(windows.values())


def insert_cache(
    graph: Graph, attentions: list[Attention], groups: list[Group], scope: str, dtype: torch.dtype | None = None
) -> Cache:
    """Add the inputs count, position, key_<l>, value_<l>; outputs of the same names end in _next.

    groups: the layers that evict. Where there are any: length and keep too, and a plan for each group. For every
    window: window_length_<index>. dtype: of the caches (None: that of keys and values).
    """
    windows = group_windows(attentions)
    places = {
        match.attention.layer: (group, index)
        for group, members in enumerate(groups)
        for index, match in enumerate(members.matches)
    }
    batch = graph.shape(graph.inputs["input_ids"])[0]
    count = graph.input("count", (batch,), torch.int32)
    position = graph.input("position", (batch,), torch.int64)
    if groups:
        length = graph.input("length", (batch,), torch.int32)
        plans = [_plan_input(graph, group, scope) for group in groups]
        keep = graph.input("keep", (batch,), torch.int32)
    caches = _cache_inputs(graph, attentions, windows, dtype)
    window_lengths = [graph.input(f"window_length_{index}", (batch,), torch.int32) for index in range(len(windows))]

    call = graph.call
    old_positions = graph.inputs["position_ids"]
    rows: dict[int, _Rows] = {}  # by layer
    with graph.before(graph.first_call()):
        steps = call(aten.arange.default, graph.size(graph.inputs["input_ids"], 1), dtype=torch.int64)
        positions = call(aten.add.Tensor, call(aten.unsqueeze.default, position, 1), steps)
        end = call(aten.add.Tensor, position, count)
        if groups:
            planned = _planned_rows(graph, caches[next(iter(places))][0], steps, count, length, plans[0], keep)
            graph.outputs["length_next"] = planned.held
            rows |= {layer: replace(planned, plan=plans[group]) for layer, (group, _) in places.items()}
        for index, (window, held) in enumerate(zip(windows, window_lengths, strict=True)):
            example, plan_heads = caches[window.layers[0]][0], plan_shape(scope, 1, batch, window.kv_heads, None)[2]
            trimmed = _window_rows(graph, window, example, plan_heads, steps, positions, count, held)
            graph.outputs[f"window_length_{index}_next"] = trimmed.held
            rows |= dict.fromkeys(window.layers, trimmed)
    old_positions.replace_all_uses_with(positions)
    graph.remove(old_positions)

    keys: list[list[Node]] = [[] for _ in groups]
    for attention in attentions:
        group, index = places.get(attention.layer, (None, 0))
        key, value = caches[attention.layer]
        place, where = attention.node, rows[attention.layer]
        with graph.before(place):
            new = [_cast(graph, node, key.meta["val"].dtype) for node in (attention.key, attention.value)]
            updated = call(
                torch.ops.keysieve.update.default,
                *new, where.length, where.plan, where.keep, key, value, index,
            )  # fmt: skip
            key_next, value_next = graph.item(updated, 0), graph.item(updated, 1)
            kind = attention.query.meta["val"].dtype
            key_read, value_read = _cast(graph, key_next, kind), _cast(graph, value_next, kind)
            attend = _attend(graph, attention, key_read, value_read, where.mask)
        place.replace_all_uses_with(attend)
        graph.fx.erase_node(place)
        graph.outputs[f"{key.name}_next"] = key_next
        graph.outputs[f"{value.name}_next"] = value_next
        if group is not None:
            keys[group].append(key_next)
    return Cache(positions, end, count, planned.held if groups else None, keys, windows)


def _plan_input(graph: Graph, group: Group, scope: str) -> Node:
    """plan<suffix> [Lp,B,Hp,C]."""
    batch = graph.shape(graph.inputs["input_ids"])[0]
    shape = plan_shape(scope, len(group.matches), batch, group.kv_heads, graph.symbol("capacity"))
    return graph.input(f"plan{group.suffix}", shape, torch.int32)


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    return node if node.meta["val"].dtype == dtype else graph.call(aten.to.dtype, node, dtype)


def _cache_inputs(
    graph: Graph, attentions: list[Attention], windows: list[Window], dtype: torch.dtype | None
) -> list[tuple[Node, Node]]:
    """key_<l> [B,Hkv,C,D] and value_<l> [B,Hkv,C,Dv] of every layer; each window has a capacity of its own."""
    batch = graph.shape(graph.inputs["input_ids"])[0]
    capacity = {layer: f"window_{index}" for index, window in enumerate(windows) for layer in window.layers}
    caches = []
    for attention in attentions:
        rows = graph.symbol(capacity.get(attention.layer, "capacity"))
        kind, shape = dtype or attention.key.meta["val"].dtype, (batch, attention.kv_heads, rows)
        key = graph.input(f"key_{attention.layer}", (*shape, attention.head_dim), kind)
        value = graph.input(f"value_{attention.layer}", (*shape, attention.value_dim), kind)
        caches.append((key, value))
    return caches


def _planned_rows(graph: Graph, cache: Node, steps: Node, count: Node, length: Node, plan: Node, keep: Node) -> _Rows:
    """Rows by the plan of the last step."""
    call = graph.call
    start = call(aten.where.self, call(aten.ge.Scalar, keep, 0), keep, length)
    rows = call(aten.arange.default, graph.size(cache, 2), dtype=torch.int64)
    newest = call(aten.add.Tensor, call(aten.unsqueeze.default, start, 1), steps)  # [B,S]: the row of each token
    mask = call(aten.le.Tensor, rows, call(aten.unsqueeze.default, newest, 2))  # [B,S,C]
    return _Rows(length, plan, keep, call(aten.add.Tensor, start, count), call(aten.unsqueeze.default, mask, 1))


def _window_rows(
    graph: Graph, window: Window, cache: Node, plan_heads: int, steps: Node, positions: Node, count: Node, length: Node
) -> _Rows:
    """Rows of consecutive tokens, of which the last W - 1 stay when there is no room for S more."""
    call, needed = graph.call, window.size - 1
    rows = call(aten.arange.default, graph.size(cache, 2), dtype=torch.int64)
    full = call(aten.add.Tensor, length, graph.size(graph.inputs["input_ids"], 1))
    crowded = call(aten.gt.Tensor, full, call(aten.full.default, [1], graph.size(cache, 2), dtype=torch.int64))
    trimmed = call(aten.bitwise_and.Tensor, crowded, call(aten.gt.Scalar, length, needed))
    nothing = call(aten.full_like.default, length, -1)
    keep = call(aten.where.self, trimmed, call(aten.full_like.default, length, needed), nothing)
    start = call(aten.where.self, trimmed, keep, length)

    first = call(aten.clamp.default, call(aten.sub.Tensor, length, needed), 0)
    plan = call(aten.add.Tensor, call(aten.unsqueeze.default, first, 1), rows)
    plan = call(aten.to.dtype, call(aten.unsqueeze.default, call(aten.unsqueeze.default, plan, 1), 0), torch.int32)
    plan = call(aten.expand.default, plan, [-1, -1, plan_heads, -1])  # [1,B,Hp,C]

    behind = call(aten.sub.Tensor, graph.inputs["position"], start)  # [B]: the position of row 0
    key = call(aten.unsqueeze.default, call(aten.add.Tensor, call(aten.unsqueeze.default, behind, 1), rows), 1)
    query = call(aten.unsqueeze.default, positions, 2)
    mask = call(aten.le.Tensor, key, query)  # [B,S,C]
    if window.span.window:
        near = call(aten.lt.Scalar, call(aten.sub.Tensor, query, key), window.size)
    else:
        near = call(aten.eq.Tensor, *(call(aten.floor_divide.default, side, window.size) for side in (query, key)))
    mask = call(aten.unsqueeze.default, call(aten.bitwise_and.Tensor, mask, near), 1)
    return _Rows(length, plan, keep, call(aten.add.Tensor, start, count), mask)


def _attend(graph: Graph, attention: Attention, key: Node, value: Node, mask: Node) -> Node:
    """[B,Hq,S,Dv]: one node, or plain operations where logits are capped or sinks take their share."""
    call, query = graph.call, attention.query
    if not attention.softcap and attention.sinks is None:
        return call(torch.ops.keysieve.attend.default, query, key, value, mask, attention.scale)
    batch, tokens = (graph.size(graph.inputs["input_ids"], axis) for axis in (0, 1))
    heads, kv_heads, dtype = attention.query_heads, attention.kv_heads, query.meta["val"].dtype
    # The query heads of a KV head become rows of it, so that no K or V is repeated.
    rows = call(aten.reshape.default, query, [batch, kv_heads, -1, attention.head_dim])
    logits = call(aten.matmul.default, rows, call(aten.transpose.int, key, 2, 3))
    logits = call(aten.reshape.default, logits, [batch, heads, tokens, graph.size(key, 2)])
    logits = call(aten.mul.Tensor, call(aten.to.dtype, logits, torch.float32), attention.scale)
    if attention.softcap:
        capped = call(aten.tanh.default, call(aten.div.Tensor, logits, attention.softcap))
        logits = call(aten.mul.Tensor, capped, attention.softcap)
    logits = call(aten.where.ScalarOther, mask, logits, float("-inf"))
    if attention.sinks is not None:
        sinks = call(aten.reshape.default, call(aten.to.dtype, attention.sinks, torch.float32), [1, heads, 1, 1])
        logits = call(aten.cat.default, [logits, call(aten.expand.default, sinks, [batch, -1, tokens, -1])], 3)
    weights = call(aten.softmax.int, logits, 3)
    if attention.sinks is not None:
        weights = call(aten.slice.Tensor, weights, 3, 0, -1)
    weights = call(aten.to.dtype, weights, dtype)
    weights = call(aten.reshape.default, weights, [batch, kv_heads, -1, graph.size(key, 2)])
    result = call(aten.matmul.default, weights, value)
    return call(aten.reshape.default, result, [batch, heads, tokens, attention.value_dim])
