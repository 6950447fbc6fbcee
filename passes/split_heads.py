"""split_heads: attention whose KV heads have several budgets becomes one attention for each budget.

    query, key, value -> attention
becomes
    query, key, value -> heads of class 0 -> attention
                      -> heads of class 1 -> attention   -> cat -> in the model's order

Few heads fetch from far back, most live on their neighbourhood (docs/method.md). So heads fall into classes, and all
caches of a class have the same number of rows. Each class is a cache of its own with a length, a budget and a plan of
its own; whatever comes behind this pass treats it as a layer. Layers whose heads are of one class stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.result import Attention, RopeAttention

aten = torch.ops.aten
HEADS = 1  # axis


def split_heads(
    graph: Graph, attentions: list[Attention], matches: list[RopeAttention], classes: Mapping[int, Sequence[int]]
) -> tuple[list[Attention], list[RopeAttention]]:
    """classes: the class of every KV head, by layer. Returns both lists with the parts in place of their layers."""
    parts: dict[int, list[Attention]] = {}
    for attention in attentions:
        of_heads = classes.get(attention.layer, ())
        if len(set(of_heads)) > 1:
            parts[attention.layer] = _split(graph, attention, of_heads)
        else:
            parts[attention.layer] = [replace(attention, head_class=next(iter(of_heads), 0))]
    split = [part for attention in attentions for part in parts[attention.layer]]
    return split, [replace(match, attention=part) for match in matches for part in parts[match.attention.layer]]


def query_heads(attention: Attention) -> list[int]:
    """The query heads of a part, by their numbers in the layer."""
    group = attention.query_heads // attention.kv_heads
    heads = range(attention.kv_heads) if attention.heads is None else attention.heads
    return [group * head + query for head in heads for query in range(group)]


def pick(graph: Graph, node: Node, axis: int, indices: Sequence[int]) -> Node:
    """Those indices of an axis, in that order: the node itself, a slice of it, or a copy."""
    first, count = indices[0], len(indices)
    if list(indices) == list(range(first, first + count)):
        if count == graph.shape(node)[axis]:
            return node
        return graph.call(aten.slice.Tensor, node, axis, first, first + count)
    return graph.call(aten.index_select.default, node, axis, _constant(graph, torch.tensor(list(indices))))


def _constant(graph: Graph, indices: Tensor) -> Node:
    """A constant, which layers with the same heads share."""
    for node, tensor in graph.tensors.items():
        if node.name.startswith("heads_") and torch.equal(tensor, indices):
            return node
    return graph.constant(f"heads_{len(graph.specs)}", indices)


def _split(graph: Graph, attention: Attention, classes: Sequence[int]) -> list[Attention]:
    group = attention.query_heads // attention.kv_heads
    parts, reads, order = [], [], []
    with graph.before(attention.node):
        for head_class in sorted(set(classes)):
            heads = tuple(head for head, its in enumerate(classes) if its == head_class)
            queries = [group * head + query for head in heads for query in range(group)]
            query = pick(graph, attention.query, HEADS, queries)
            key, value = (pick(graph, node, HEADS, heads) for node in (attention.key, attention.value))
            sinks = pick(graph, attention.sinks, 0, queries) if attention.sinks is not None else None
            # What attends over the cache replaces it, so it has the right shape and nothing else.
            node = graph.call(aten.scaled_dot_product_attention.default, query, key, value, enable_gqa=True)
            parts.append(
                replace(
                    attention,
                    node=node, query=query, key=key, value=value, sinks=sinks, heads=heads, head_class=head_class,
                )
            )  # fmt: skip
            reads.append(node)
            order += queries
        joined = graph.call(aten.cat.default, reads, HEADS)
        restored = pick(graph, joined, HEADS, [order.index(query) for query in range(len(order))])
    attention.node.replace_all_uses_with(restored)
    graph.fx.erase_node(attention.node)
    return parts
