"""tap_inputs: expose what gates are learned from: the projections' input, and queries and keys as attention sees them.

h -> q_proj, k_proj -> (norms) -> RoPE -> query, key -> attention
\\-> hidden_<layer>                       \\-> query_<layer>, key_<layer> (, sinks_<layer>)
"""

import torch

from keysieve.passes.find_inputs import find_inputs
from keysieve.passes.graph import Graph
from keysieve.passes.result import RopeAttention


def tap_inputs(graph: Graph, matches: list[RopeAttention]) -> None:
    """Add these outputs for every match whose projections have a common input (see find_inputs).

    hidden [B,S,d], query [B,Hq,S,D] and key [B,Hkv,S,D] after RoPE, sinks [Hq] where the layer has them.
    """
    inputs = find_inputs(graph, [match.attention for match in matches])
    for match in matches:
        attention = match.attention
        if attention.layer not in inputs:
            continue
        found = {"hidden": inputs[attention.layer], "query": attention.query, "key": attention.key}
        if attention.sinks is not None:
            with graph.before(attention.node):  # a parameter is no output
                found["sinks"] = graph.call(torch.ops.aten.clone.default, attention.sinks)
        graph.outputs |= {f"{name}_{attention.layer}": node for name, node in found.items()}
