"""lower_attention: bring attention written with scaled_dot_product_attention or matmul-softmax-matmul to one form.

    q, repeat_kv(k), repeat_kv(v), mask -> scaled_dot_product_attention
    q @ k.T * scale + mask -> softmax -> dropout -> @ v
become
    q, k, v -> keysieve::attention(scale, window or chunk)

Matched means verified here too: the subgraph from q, k and v to the result is evaluated on random numbers, and the
mask on real positions (mask_span); the rewrite happens only if causal attention of that scale and span gives the same.
"""

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from keysieve.kernels.reference import attend, visible
from keysieve.passes.graph import Graph
from keysieve.passes.mask_span import EVALUATION_ERRORS, Span, mask_span
from keysieve.passes.result import Miss

aten = torch.ops.aten
SHAPE_ONLY = {
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.repeat_interleave.self_int,
}
PASS_THROUGH = {aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.clone.default}
TOLERANCE = 1e-9


@dataclass(frozen=True)
class _Anchor:
    """One attention as written: its result, its inputs (K and V perhaps repeated), its mask and scale."""

    result: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    scale: float


def lower_attention(graph: Graph) -> list[Miss]:
    """Rewrite every verified SDPA and eager attention in place; returns those that could not be rewritten.

    A graph captured with keysieve's own attention function has none of either and is left alone.
    """
    anchors: list[tuple[Node, _Anchor | None]] = []
    for node in graph.calls(aten.scaled_dot_product_attention.default):
        anchors.append((node, _sdpa(graph, node)))
    for node in [*graph.calls(aten.softmax.int), *graph.calls(aten._softmax.default)]:
        if len(graph.shape(node)) == 4:
            anchors.append((node, _eager(graph, node)))
    misses = []
    for layer, (node, anchor) in enumerate(anchors):
        reason = "softmax is not fed by q @ k.T with a constant scale and a mask" if anchor is None else None
        if anchor is not None:
            reason = _rewrite(graph, anchor, layer)
        if reason:
            misses.append(Miss(layer, node.name, reason))
    return misses


def _sdpa(graph: Graph, node: Node) -> _Anchor:
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments.update(node.kwargs)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    scale = arguments.get("scale")
    if not isinstance(scale, float):
        scale = float(graph.shape(query)[-1]) ** -0.5  # type: ignore[arg-type]
    mask = arguments.get("attn_mask")
    return _Anchor(node, query, key, value, mask, bool(arguments.get("is_causal")), scale)  # type: ignore[arg-type]


def _eager(graph: Graph, softmax: Node) -> _Anchor | None:
    result = softmax
    while result.target is not aten.matmul.default:
        if len(result.users) != 1 or (result is not softmax and result.target not in PASS_THROUGH):
            return None
        result = next(iter(result.users))
    node, scale, mask = softmax.args[0], 1.0, None
    while isinstance(node, Node) and node.target is not aten.matmul.default:
        first, second = (*node.args, None)[:2]
        if node.target is aten.add.Tensor and mask is None and isinstance(second, Node):
            mask = second
        elif node.target is aten.mul.Tensor and isinstance(second, (int, float)):
            scale *= second
        elif node.target is aten.div.Tensor and isinstance(second, (int, float)):
            scale /= second
        elif node.target not in PASS_THROUGH:
            return None
        node = first
    if not isinstance(node, Node):
        return None
    query, transposed = node.args
    if not isinstance(transposed, Node) or transposed.target is not aten.transpose.int:
        return None
    if sorted(axis % 4 for axis in transposed.args[1:]) != [2, 3]:  # type: ignore[operator]
        return None
    key, value = transposed.args[0], result.args[1]
    return _Anchor(result, query, key, value, mask, False, scale)  # type: ignore[arg-type]


def _rewrite(graph: Graph, anchor: _Anchor, layer: int) -> str | None:
    """Verify one anchor and replace it; returns the reason where it cannot be."""
    span = Span()
    if anchor.mask is not None:
        found = mask_span(graph, anchor.mask)
        if isinstance(found, str):
            return found
        span = found
    elif not anchor.causal:
        return "attention has no mask, so it is not causal"
    key, value = _unrepeated(graph, anchor.key), _unrepeated(graph, anchor.value)
    if not _verified(graph, anchor, key, value, span):
        return "the result is not causal softmax attention of its query, key and value"
    with graph.before(anchor.result):
        attention = graph.call(
            torch.ops.keysieve.attention.default,
            anchor.query, key, value, None, None, anchor.scale, span.window, span.chunk, 0.0, layer,
        )  # fmt: skip
    anchor.result.replace_all_uses_with(attention)
    graph.fx.erase_node(anchor.result)
    graph.fx.eliminate_dead_code()
    return None


def _unrepeated(graph: Graph, node: Node) -> Node:
    """The [B,Hkv,S,D] tensor that repeat_kv repeats, or the node itself."""
    heads, best = graph.shape(node)[1], node
    while node.target in SHAPE_ONLY:
        node = node.args[0]  # type: ignore[assignment]
        shape = graph.shape(node)
        if len(shape) == 4 and isinstance(shape[1], int) and shape[1] < heads and heads % shape[1] == 0:
            best = node
    return best


def _sizes_and_positions(graph: Graph, batch: int, size: int) -> dict[Node, torch.Tensor]:
    return {
        graph.inputs["input_ids"]: torch.zeros(batch, size, dtype=torch.long),
        graph.inputs["position_ids"]: torch.arange(size).repeat(batch, 1),
    }


def _verified(graph: Graph, anchor: _Anchor, key: Node, value: Node, span: Span) -> bool:
    batch, size = 2, 7
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for node in (anchor.query, key, value):
        _, heads, _, dim = graph.shape(node)
        tensors[node] = torch.randn(batch, heads, size, dim, dtype=torch.float64, generator=generator)
    try:
        result = graph.evaluate(anchor.result, {**_sizes_and_positions(graph, batch, size), **tensors})
    except EVALUATION_ERRORS:
        return False
    rows = torch.arange(size)
    mask = visible(rows[:, None], rows, span.window, span.chunk)
    query, key_rows, value_rows = tensors[anchor.query], tensors[key], tensors[value]
    expected = attend(query, key_rows, value_rows, mask[None, None], anchor.scale)
    return math.isfinite(anchor.scale) and torch.allclose(result, expected, rtol=0, atol=TOLERANCE)
