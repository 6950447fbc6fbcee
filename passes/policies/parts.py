"""The score inputs of parts of layers, out of those of the layers."""

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group
from keysieve.passes.policies import ScoreInputs
from keysieve.passes.split_heads import query_heads

aten = torch.ops.aten


def of_parts(graph: Graph, inputs: ScoreInputs, layers: Group, parts: Group) -> ScoreInputs:
    """Centres and weights of the query heads that the parts have; inputs: those of the group of layers they are of."""
    numbers = [match.attention.layer for match in layers.matches]
    of_all = layers.query_heads
    wanted = [
        numbers.index(part.attention.layer) * of_all + head
        for part in parts.matches
        for head in query_heads(part.attention)
    ]
    if wanted == list(range(len(numbers) * of_all)):
        return inputs
    with graph.before(graph.output_node):
        index = graph.constant(f"heads_of{parts.suffix}", torch.tensor(wanted))
        centre, weight = (_picked(graph, node, index, len(parts.matches)) for node in (inputs.centre, inputs.weight))
    return ScoreInputs(inputs.policy, centre, weight, inputs.rotary_dim, inputs.interleaved)


def _picked(graph: Graph, node: Node, index: Node, layers: int) -> Node:
    """[L,B,Hq,...] -> [layers,B,heads,...], where index counts the heads of all L."""
    call, axes = graph.call, list(range(3, len(graph.shape(node))))
    sizes = [graph.size(node, axis) for axis in (1, *axes)]
    heads_first = call(aten.permute.default, node, [0, 2, 1, *axes])
    flat = call(aten.reshape.default, heads_first, [-1, *sizes])
    picked = call(aten.index_select.default, flat, 0, index)
    apart = call(aten.reshape.default, picked, [layers, graph.shape(index)[0] // layers, *sizes])
    return call(aten.permute.default, apart, [0, 2, 1, *axes])
