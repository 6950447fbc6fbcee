"""arrange_heads: every rotated head in the order that the kernels know.

    query, key -> attention
becomes
    query, key -> index_select(dims) -> attention

A kernel's bands are half-split or interleaved, the rotated dims first and alike in all layers. Where a model's are
not, the dims of query and key are permuted alike right before the attention, which changes no product of the two.
Only the new tokens' rows are touched: the cache holds arranged keys. All layers then are half-split.
"""

from dataclasses import replace

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.result import Attention, RopeAttention


def arrange_heads(
    graph: Graph, attentions: list[Attention], matches: list[RopeAttention]
) -> tuple[list[Attention], list[RopeAttention]]:
    """Insert the permutations; returns both lists with the attentions' new queries and keys.

    A model whose layers are all half-split, or all interleaved, is left as it is.
    """
    kinds = {match.form.kind for match in matches} - {"nope"}
    if kinds <= {"half_split"} or kinds <= {"interleaved"}:
        return attentions, matches
    new: dict[Node, Attention] = {}
    orders: dict[bytes, Node] = {}
    arranged = []
    for match in matches:
        attention = match.attention
        if match.form.kind != "nope":
            dims = match.form.arranged[1]
            if dims.tobytes() not in orders:
                orders[dims.tobytes()] = graph.constant(f"head_dims_{len(orders)}", torch.from_numpy(dims))
            order = orders[dims.tobytes()]
            with graph.before(attention.node):
                query, key = (
                    graph.call(torch.ops.aten.index_select.default, node, 3, order)
                    for node in (attention.query, attention.key)
                )
            attention.node.args = (query, key, *attention.node.args[2:])
            attention = new[attention.node] = replace(attention, query=query, key=key)
        arranged.append(replace(match, attention=attention, arranged=match.form.kind != "nope"))
    return [new.get(attention.node, attention) for attention in attentions], arranged
