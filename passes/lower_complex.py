"""lower_complex: complex numbers become two real tensors, since no runtime has them.

    view_as_complex(x) * polar(r, angle) -> view_as_real
becomes
    a, b = x[..., 0], x[..., 1];  c, d = r cos(angle), r sin(angle)
    stack((a c - b d, a d + b c), -1)
"""

from typing import Any

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph

aten = torch.ops.aten
ALIKE = {  # the same on the real as on the imaginary part
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.transpose.int,
    aten.permute.default,
    aten.reshape.default,
    aten.view.default,
    aten.clone.default,
    aten.index.Tensor,
    aten.index_select.default,
}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
FROM_REAL = {aten.polar.default, aten.view_as_complex.default, aten.complex.default}
Parts = tuple[Node, Node]


def lower_complex(graph: Graph) -> bool:
    """Rewrite every complex tensor in place; a graph with an operation that is not known here is left alone."""
    numbers = {node for node in graph.fx.nodes if _is_complex(node)}
    users = {user for node in numbers for user in node.users}
    reals = set(graph.calls(aten.view_as_real.default))
    if not numbers or not all(map(_known, numbers)) or not users <= numbers | reals:
        return False
    parts: dict[Node, Parts] = {}
    for node in [n for n in graph.fx.nodes if n in numbers | users]:
        with graph.before(node if node.op == "call_function" else graph.first_call()):
            if node in numbers:
                parts[node] = _parts(graph, node, parts)
            else:
                real = graph.call(aten.stack.default, list(parts[node.args[0]]), -1)
                node.replace_all_uses_with(real)
    for node in reversed([n for n in graph.fx.nodes if n in numbers | users]):
        if node.op == "placeholder":
            graph.remove(node)
        else:
            graph.fx.erase_node(node)
    return True


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _known(node: Node) -> bool:
    return node.target in ALIKE | CASTS | FROM_REAL | {aten.mul.Tensor} or node.op == "placeholder"


def _parts(graph: Graph, node: Node, parts: dict[Node, Parts]) -> Parts:
    """The real and the imaginary part of one complex node, from those of its inputs."""
    call = graph.call
    if node.op == "placeholder":
        value = graph.tensors[node]
        return (
            graph.constant(f"{node.name}_real", value.real.contiguous()),
            graph.constant(f"{node.name}_imaginary", value.imag.contiguous()),
        )
    first, second = (*node.args, None)[:2]
    if node.target in CASTS:
        return parts[first]  # type: ignore[index]
    if node.target is aten.polar.default:
        cos, sin = (call(op.default, second) for op in (aten.cos, aten.sin))
        return call(aten.mul.Tensor, first, cos), call(aten.mul.Tensor, first, sin)
    if node.target is aten.complex.default:
        return first, second  # type: ignore[return-value]
    if node.target is aten.view_as_complex.default:
        return call(aten.select.int, first, -1, 0), call(aten.select.int, first, -1, 1)
    if node.target is aten.mul.Tensor:
        return _product(graph, parts.get(first, first), parts.get(second, second))  # type: ignore[arg-type]
    real, imaginary = parts[first]  # type: ignore[index]
    rest: Any = node.args[1:]
    return call(node.target, real, *rest, **node.kwargs), call(node.target, imaginary, *rest, **node.kwargs)  # type: ignore[arg-type]


def _product(graph: Graph, first: Any, second: Any) -> Parts:
    """Of two complex factors (each a pair of nodes), or of one with a real node or number."""

    def times(x: Any, y: Any) -> Node:
        return graph.call(aten.mul.Tensor, x, y)

    if not isinstance(first, tuple):
        first, second = second, first
    a, b = first
    if not isinstance(second, tuple):
        return times(a, second), times(b, second)
    c, d = second
    real = graph.call(aten.sub.Tensor, times(a, c), times(b, d))
    return real, graph.call(aten.add.Tensor, times(a, d), times(b, c))
