"""insert_cache: attention over a cache that is the engine's state, one graph for prefill and decode.

    query, key, value -> attention
becomes
    key, value, key_l, value_l, plan -> update -> key_l', value_l'     (compacts by the plan, then appends)
    query, key_l', value_l', first, last -> attend

position_ids is replaced by position [B] + arange(S); token s of a sequence sees the rows held before this step and
the rows of this step up to its own, `last`.

A layer with full attention, or a part of one (split_heads), executes the plan of the last step, which it shares with
those of its shape. One with a sliding window (or chunks) of W tokens follows a plan of its own, made in the same step:
when the new tokens find no room, the last W - 1 rows move to the front, which are all that any later token can see. So
its cache holds consecutive tokens, and the result is exact.
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
    lengths: rows held after the append [B] int32, by class of heads, of those that evict; keys: one [B,Hkv,C,D] a
    cache, by group; windows: the layers that evict nothing.
    """

    positions: Node
    position: Node
    count: Node
    lengths: dict[int, Node]
    keys: list[list[Node]]
    windows: list[Window]


@dataclass(frozen=True)
class _Rows:
    """What the caches of some layers have in common: where rows go, and which of them the new tokens see.

    length, plan and keep as `update` takes them; held [B]: rows after the append; first and last [B,S]: of the rows
    that each token sees (first None: from row 0 on).
    """

    length: Node
    plan: Node
    keep: Node
    held: Node
    first: Node | None
    last: Node


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
    """Add the inputs count, position, key_<cache>, value_<cache>; outputs of the same names end in _next.

    groups: the layers that evict, or the parts of them. Where there are any: length and keep too, for each class of
    heads, and a plan for each group. For every window: window_length_<index>. dtype: of the caches (None: that of keys
    and values).
    """
    windows = group_windows(attentions)
    places = {
        match.attention.cache: (group, index)
        for group, members in enumerate(groups)
        for index, match in enumerate(members.matches)
    }
    classes = class_suffixes(groups)
    batch = graph.shape(graph.inputs["input_ids"])[0]
    count = graph.input("count", (batch,), torch.int32)
    position = graph.input("position", (batch,), torch.int64)
    held = {each: graph.input(f"length{suffix}", (batch,), torch.int32) for each, suffix in classes.items()}
    plans = [_plan_input(graph, group, scope, classes) for group in groups]
    keeps = {each: graph.input(f"keep{suffix}", (batch,), torch.int32) for each, suffix in classes.items()}
    caches = _cache_inputs(graph, attentions, windows, classes, dtype)
    window_lengths = [graph.input(f"window_length_{index}", (batch,), torch.int32) for index in range(len(windows))]

    call = graph.call
    old_positions = graph.inputs["position_ids"]
    rows: dict[str, _Rows] = {}  # by cache
    planned: dict[int, _Rows] = {}  # by class
    with graph.before(graph.first_call()):
        steps = call(aten.arange.default, graph.size(graph.inputs["input_ids"], 1), dtype=torch.int64)
        positions = call(aten.add.Tensor, call(aten.unsqueeze.default, position, 1), steps)
        end = call(aten.add.Tensor, position, count)
        for each, suffix in classes.items():
            planned[each] = _planned_rows(graph, steps, count, held[each], plans[0], keeps[each])
            graph.outputs[f"length{suffix}_next"] = planned[each].held
        for cache, (group, _) in places.items():
            rows[cache] = replace(planned[groups[group].head_class], plan=plans[group])
        for index, (window, window_length) in enumerate(zip(windows, window_lengths, strict=True)):
            example = next(key for one, (key, _) in zip(attentions, caches, strict=True) if one.layer in window.layers)
            plan_heads = plan_shape(scope, 1, batch, window.kv_heads, None)[2]
            trimmed = _window_rows(graph, window, example, plan_heads, steps, positions, count, window_length)
            graph.outputs[f"window_length_{index}_next"] = trimmed.held
            rows |= dict.fromkeys(map(str, window.layers), trimmed)
    old_positions.replace_all_uses_with(positions)
    graph.remove(old_positions)

    keys: list[list[Node]] = [[] for _ in groups]
    for attention, (key, value) in zip(attentions, caches, strict=True):
        group, index = places.get(attention.cache, (-1, 0))
        place, where = attention.node, rows[attention.cache]
        with graph.before(place):
            new = [_cast(graph, node, key.meta["val"].dtype) for node in (attention.key, attention.value)]
            updated = call(
                torch.ops.keysieve.update.default,
                *new, where.length, where.plan, where.keep, key, value, index,
            )  # fmt: skip
            key_next, value_next = graph.item(updated, 0), graph.item(updated, 1)
            kind = attention.query.meta["val"].dtype
            key_read, value_read = _cast(graph, key_next, kind), _cast(graph, value_next, kind)
            attend = call(
                torch.ops.keysieve.attend.default,
                attention.query, key_read, value_read, where.first, where.last,
                attention.sinks, attention.scale, attention.softcap,
            )  # fmt: skip
        place.replace_all_uses_with(attend)
        graph.fx.erase_node(place)
        graph.outputs[f"{key.name}_next"] = key_next
        graph.outputs[f"{value.name}_next"] = value_next
        if group >= 0:
            keys[group].append(key_next)
    lengths = {each: made.held for each, made in planned.items()}
    return Cache(positions, end, count, lengths, keys, windows)


def class_suffixes(groups: list[Group]) -> dict[int, str]:
    """What ends the names of each class's inputs and outputs: "" where there is one class, else _0, _1 and so on."""
    classes = sorted({group.head_class for group in groups})
    return {each: f"_{index}" if len(classes) > 1 else "" for index, each in enumerate(classes)}


def _plan_input(graph: Graph, group: Group, scope: str, classes: dict[int, str]) -> Node:
    """plan<suffix> [Lp,B,Hp,C]."""
    batch, rows = graph.shape(graph.inputs["input_ids"])[0], graph.symbol(f"capacity{classes[group.head_class]}")
    shape = plan_shape(scope, len(group.matches), batch, group.kv_heads, rows)
    return graph.input(f"plan{group.suffix}", shape, torch.int32)


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    return node if node.meta["val"].dtype == dtype else graph.call(aten.to.dtype, node, dtype)


def _cache_inputs(
    graph: Graph,
    attentions: list[Attention],
    windows: list[Window],
    classes: dict[int, str],
    dtype: torch.dtype | None,
) -> list[tuple[Node, Node]]:
    """key_<cache> [B,Hkv,C,D] and value_<cache> [B,Hkv,C,Dv]; each class and each window has a capacity of its own."""
    batch = graph.shape(graph.inputs["input_ids"])[0]
    capacity = {layer: f"window_{index}" for index, window in enumerate(windows) for layer in window.layers}
    caches = []
    for attention in attentions:
        windowed = capacity.get(attention.layer)
        rows = graph.symbol(windowed or f"capacity{classes[attention.head_class]}")
        kind, shape = dtype or attention.key.meta["val"].dtype, (batch, attention.kv_heads, rows)
        key = graph.input(f"key_{attention.cache}", (*shape, attention.head_dim), kind)
        value = graph.input(f"value_{attention.cache}", (*shape, attention.value_dim), kind)
        caches.append((key, value))
    return caches


def _planned_rows(graph: Graph, steps: Node, count: Node, length: Node, plan: Node, keep: Node) -> _Rows:
    """Rows by the plan of the last step."""
    call = graph.call
    start = call(aten.where.self, call(aten.ge.Scalar, keep, 0), keep, length)
    newest = call(aten.add.Tensor, call(aten.unsqueeze.default, start, 1), steps)  # [B,S]: the row of each token
    return _Rows(length, plan, keep, call(aten.add.Tensor, start, count), None, newest)


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

    # Row r holds the token r before or behind the newest's by as many positions as rows.
    newest = call(aten.add.Tensor, call(aten.unsqueeze.default, start, 1), steps)  # [B,S]: the row of each token
    if window.span.window:
        oldest = call(aten.sub.Tensor, newest, needed)
    else:
        oldest = call(aten.sub.Tensor, newest, call(aten.remainder.Scalar, positions, window.size))
    return _Rows(length, plan, keep, call(aten.add.Tensor, start, count), oldest, newest)
