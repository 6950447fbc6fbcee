"""find_inputs: the hidden state from which each attention's queries, keys and values are all projected.

    [h] -> q_proj -> (q_norm) -> RoPE -> query
        -> k_proj -> (k_norm) -> RoPE -> key
        -> v_proj ---------------------> value

One fused projection counts as three. Where keys and values come from something else than the queries, such as the
latents of MLA or another layer's rows, there is no such state.
"""

from typing import Any

import torch
from torch.fx import Node

from keysieve.passes.find_rope import PROJECTIONS
from keysieve.passes.graph import Graph
from keysieve.passes.result import Attention, Found, Miss

aten = torch.ops.aten
INPUT_AT: dict[Any, int] = {aten.linear.default: 0, aten.addmm.default: 1, aten.mm.default: 0, aten.matmul.default: 0}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default}


def find_inputs(graph: Graph, attentions: list[Attention]) -> dict[int, Node]:
    """Layer (Attention.layer) -> the node h [B,S,d] that its query, key and value projections read; others lack."""
    return dict(inputs_or_misses(graph, attentions).matches)


def inputs_or_misses(graph: Graph, attentions: list[Attention]) -> Found[tuple[int, Node]]:
    """The same as pairs, and for each layer without a common input why it has none."""
    data = graph.depends_on([graph.inputs["input_ids"]])
    found: Found[tuple[int, Node]] = Found([])
    for attention in attentions:
        node_or_reason = _common_input(graph, attention, data)
        if isinstance(node_or_reason, str):
            found.misses.append(Miss(attention.number, attention.node.name, node_or_reason))
        else:
            found.matches.append((attention.layer, node_or_reason))
    return found


def _common_input(graph: Graph, attention: Attention, data: set[Node]) -> Node | str:
    inputs: dict[Node, str] = {}
    for role in ("query", "key", "value"):
        for projection in _projections_above(getattr(attention, role), data):
            source = _input_of(graph, projection, data)
            if source is None:
                return f"its {role} comes from {projection.name} ({projection.target}), which is no linear projection"
            inputs.setdefault(source, role)
    if len(inputs) > 1:
        listed = ", ".join(f"{role} from {node.name}" for node, role in inputs.items())
        return f"query, key and value are projected from more than one input: {listed}"
    (source,) = inputs
    if len(graph.shape(source)) != 3 or not isinstance(graph.shape(source)[2], int):
        return f"the projections' input {source.name} has shape {list(graph.shape(source))}, which is not [B, S, d]"
    return source


def _projections_above(node: Node, data: set[Node]) -> list[Node]:
    """The projections nearest to a node on all ways up from it, through what depends on the tokens."""
    found, seen, todo = [], set(), [node]
    while todo:
        node = todo.pop()
        if node in seen or node not in data:
            continue
        seen.add(node)
        if node.op == "placeholder" or node.target in PROJECTIONS:
            found.append(node)
        else:
            todo.extend(node.all_input_nodes)
    return sorted(found)


def _input_of(graph: Graph, projection: Node, data: set[Node]) -> Node | None:
    """What a product with a weight reads, before reshapes to fewer dims; None where it is no such product."""
    at = INPUT_AT.get(projection.target)
    if at is None or sum(node in data for node in projection.all_input_nodes) != 1:
        return None
    source = projection.args[at]
    if not isinstance(source, Node) or source not in data:
        return None
    while source.target in RESHAPES and len(graph.shape(source)) != 3:
        (source,) = source.all_input_nodes[:1]
    return source
