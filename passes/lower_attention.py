"""lower_attention: bring attention that a model writes itself to one form.

    q, repeat_kv(k), repeat_kv(v), mask -> scaled_dot_product_attention
    q @ k.T * scale + mask -> softmax -> dropout -> @ v
    (whatever attention_forms reads)
become
    q, k, v -> keysieve::attention(scale, window or chunk)

Matched means verified here too: the subgraph from q, k and v to the result is evaluated on random numbers, and the
mask on real positions (mask_span); the rewrite happens only if causal attention of that scale and span gives the same.
"""

import math

import torch
from torch.fx import Node

from keysieve.kernels.reference import attend, visible
from keysieve.passes.attention_forms import Anchor, read_attentions
from keysieve.passes.graph import CANNOT_EVALUATE, Graph
from keysieve.passes.mask_span import Span, mask_span
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
TOLERANCE = 1e-9


def lower_attention(graph: Graph) -> list[Miss]:
    """Rewrite every attention that is read and verified, in place; returns those that could not be rewritten.

    A graph captured with keysieve's own attention function has none to read and is left alone.
    """
    misses = []
    for layer, (node, anchor) in enumerate(read_attentions(graph)):
        if anchor is None:
            reason: str | None = f"no known form of attention is written around this {node.target} (docs/extending.md)"
        else:
            reason = _rewrite(graph, anchor, layer)
        if reason:
            misses.append(Miss(layer, node.name, reason))
    return misses


def _rewrite(graph: Graph, anchor: Anchor, layer: int) -> str | None:
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


def _verified(graph: Graph, anchor: Anchor, key: Node, value: Node, span: Span) -> bool:
    batch, size = 2, 7
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for node in (anchor.query, key, value):
        _, heads, _, dim = graph.shape(node)
        tensors[node] = torch.randn(batch, heads, size, dim, dtype=torch.float64, generator=generator)
    try:
        result = graph.evaluate(anchor.result, {**_sizes_and_positions(graph, batch, size), **tensors})
    except CANNOT_EVALUATE:
        return False
    rows = torch.arange(size)
    mask = visible(rows[:, None], rows, span.window, span.chunk)
    query, key_rows, value_rows = tensors[anchor.query], tensors[key], tensors[value]
    expected = attend(query, key_rows, value_rows, mask[None, None], anchor.scale)
    return math.isfinite(anchor.scale) and torch.allclose(result, expected, rtol=0, atol=TOLERANCE)
