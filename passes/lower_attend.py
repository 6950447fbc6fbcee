"""lower_attend: attention over the cache in operations that ONNX has.

    query, key_l', value_l', first, last -> attend
becomes
    first, last                          -> mask, for all layers that see the same rows
    query, key_l', value_l', mask        -> scaled_dot_product_attention

and plain operations where logits are capped or sinks take their share, which ONNX's Attention does not do alike.
"""

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph

aten = torch.ops.aten


def lower_attend(graph: Graph) -> None:
    """Replace every attend node."""
    masks: dict[tuple[object, ...], Node] = {}
    for node in graph.calls(torch.ops.keysieve.attend.default):
        query, key, value, first, last, sinks, scale, softcap = node.args
        with graph.before(node):
            seen = first, last, str(graph.shape(key)[2])  # type: ignore[arg-type]
            if seen not in masks:
                masks[seen] = _mask(graph, key, first, last)  # type: ignore[arg-type]
            if softcap or sinks is not None:
                read = _plain(graph, node, masks[seen])
            else:
                read = graph.call(
                    aten.scaled_dot_product_attention.default,
                    query, key, value, masks[seen], scale=scale, enable_gqa=True,
                )  # fmt: skip
        node.replace_all_uses_with(read)
        graph.fx.erase_node(node)


def _mask(graph: Graph, key: Node, first: Node | None, last: Node) -> Node:
    """[B,1,S,C] bool: whether token s sees row c."""
    call = graph.call
    rows = call(aten.arange.default, graph.size(key, 2), dtype=torch.int64)
    mask = call(aten.le.Tensor, rows, call(aten.unsqueeze.default, last, 2))
    if first is not None:
        mask = call(aten.bitwise_and.Tensor, mask, call(aten.ge.Tensor, rows, call(aten.unsqueeze.default, first, 2)))
    return call(aten.unsqueeze.default, mask, 1)


def _plain(graph: Graph, node: Node, mask: Node) -> Node:
    """[B,Hq,S,Dv] with capped logits or sinks; query [B,Hq,S,D], key and value [B,Hkv,C,...]."""
    call, (query, key, value, _, _, sinks, scale, softcap) = graph.call, node.args
    batch, heads, tokens, head_dim = (graph.size(query, axis) for axis in range(4))  # type: ignore[arg-type]
    kv_heads, rows = (graph.size(key, axis) for axis in (1, 2))  # type: ignore[arg-type]
    # The query heads of a KV head become rows of it, so that no K or V is repeated.
    grouped = call(aten.reshape.default, query, [batch, kv_heads, -1, head_dim])
    logits = call(aten.matmul.default, grouped, call(aten.transpose.int, key, 2, 3))
    logits = call(aten.reshape.default, logits, [batch, heads, tokens, rows])
    logits = call(aten.mul.Tensor, call(aten.to.dtype, logits, torch.float32), scale)
    if softcap:
        logits = call(aten.mul.Tensor, call(aten.tanh.default, call(aten.div.Tensor, logits, softcap)), softcap)
    logits = call(aten.where.ScalarOther, mask, logits, float("-inf"))
    if sinks is not None:
        sinks = call(aten.reshape.default, call(aten.to.dtype, sinks, torch.float32), [1, heads, 1, 1])
        logits = call(aten.cat.default, [logits, call(aten.expand.default, sinks, [batch, -1, tokens, -1])], 3)
    weights = call(aten.softmax.int, logits, 3)
    if sinks is not None:
        weights = call(aten.slice.Tensor, weights, 3, 0, -1)
    weights = call(aten.to.dtype, weights, query.meta["val"].dtype)  # type: ignore[union-attr]
    weights = call(aten.reshape.default, weights, [batch, kv_heads, -1, rows])
    read = call(aten.matmul.default, weights, value)
    return call(aten.reshape.default, read, [batch, heads, tokens, graph.size(value, 3)])  # type: ignore[arg-type]
