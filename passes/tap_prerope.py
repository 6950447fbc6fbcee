"""tap_prerope: expose the pre-RoPE queries of every layer.

hidden -> q_proj -> (q_norm) -> [q_pre] -> RoPE -> attention
                                   \\-> query_pre_<layer>  [B,Hq,S,D]
"""

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.result import RopeAttention


def tap_prerope(graph: Graph, matches: list[RopeAttention]) -> list[Node]:
    """One node a match: its pre-RoPE queries as [B,Hq,S,D], after q_norm and without attention scaling."""
    batch, sequence = graph.shape(graph.inputs["input_ids"])
    taps = []
    for match in matches:
        axes = [str(size) for size in graph.shape(match.query_pre)]
        order = [axes.index(str(batch)), -1, axes.index(str(sequence)), 3]
        order[1] = ({0, 1, 2, 3} - set(order)).pop()
        if order == [0, 1, 2, 3]:
            taps.append(match.query_pre)
            continue
        with graph.fx.inserting_after(match.query_pre):
            taps.append(graph.call(torch.ops.aten.permute.default, match.query_pre, order))
    return taps


def tap_only(graph: Graph, matches: list[RopeAttention]) -> None:
    """Make the taps the graph's only outputs (for calibration): what comes after the last query is dropped."""
    taps = tap_prerope(graph, matches)
    graph.outputs = {f"query_pre_{match.attention.layer}": tap for match, tap in zip(matches, taps, strict=True)}
