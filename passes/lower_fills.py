"""lower_fills: a tensor that is made empty and filled part by part becomes a cat of its parts.

    x = new_empty(...); x[..., :n].copy_(a); x[..., n:].copy_(b)
becomes
    x = cat((a, b), -1)

Passes follow values along the edges of the graph, and a copy_ into a slice has none.
"""

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph

aten = torch.ops.aten
EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


def lower_fills(graph: Graph) -> int:
    """Rewrite in place every fill whose parts lie side by side along one axis; returns how many there were."""
    count = 0
    for node in list(graph.fx.nodes):
        if node.target in EMPTY:
            count += _rewrite(graph, node)
    return count


def _rewrite(graph: Graph, empty: Node) -> bool:
    parts: list[tuple[Node, Node]] = []  # (slice, copy_ into it)
    readers = []
    for user in empty.users:
        copies = list(user.users)
        if user.target is aten.slice.Tensor and len(copies) == 1 and copies[0].target is aten.copy_.default:
            parts.append((user, copies[0]))
        else:
            readers.append(user)
    if not parts or not readers:
        return False
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    last = max((copy for _, copy in parts), key=order.__getitem__)
    if any(order[reader] < order[last] for reader in readers) or any(copy.users for _, copy in parts):
        return False
    axis = _axis_of_tiles(graph, empty, parts)
    if axis is None:
        return False
    with graph.before(last):
        values = []
        for part, copy in sorted(parts, key=lambda both: both[0].args[2]):  # type: ignore[arg-type, return-value]
            value: Node = copy.args[1]  # type: ignore[assignment]
            if graph.shape(value) != graph.shape(part):
                sizes = [size if isinstance(size, int) else -1 for size in graph.shape(part)]
                value = graph.call(aten.expand.default, value, sizes)
            if value.meta["val"].dtype != empty.meta["val"].dtype:
                value = graph.call(aten.to.dtype, value, empty.meta["val"].dtype)
            values.append(value)
        filled = graph.call(aten.cat.default, values, axis)
    for part, copy in parts:
        graph.fx.erase_node(copy)
        graph.fx.erase_node(part)
    empty.replace_all_uses_with(filled)
    graph.fx.erase_node(empty)
    return True


def _axis_of_tiles(graph: Graph, empty: Node, parts: list[tuple[Node, Node]]) -> int | None:
    """The axis along which the slices follow each other from the first element to the last, if so."""
    axes = {int(part.args[1]) for part, _ in parts}  # type: ignore[arg-type]
    axis = axes.pop()
    size = graph.shape(empty)[axis]
    if axes or not isinstance(size, int):
        return None
    reached = 0
    for part, _ in sorted(parts, key=lambda both: both[0].args[2]):  # type: ignore[arg-type, return-value]
        _, _, start, end, step = (*part.args, 1)[:5]
        if start != reached or not isinstance(end, int) or step != 1:
            return None
        reached = min(end, size)
    return axis if reached == size else None
