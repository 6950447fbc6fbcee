"""tap_prerope: expose the pre-RoPE queries of every layer.

hidden -> q_proj -> (q_norm) -> [query_pre] -> RoPE -> (norm) -> attention
                                    \\-> (norm) -> query_pre_<layer>  [B,Hq,S,D]
"""

import numpy as np
import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.result import RopeAttention


def tap_prerope(graph: Graph, matches: list[RopeAttention]) -> list[Node]:
    """One node a match: its pre-RoPE queries as [B,Hq,S,D], after q_norm and without attention scaling.

    A norm that the model has after RoPE commutes with it, and is applied to the pre-RoPE queries instead.
    """
    taps = []
    for match in matches:
        with graph.before(match.query_pre.next):
            tap, layout = match.query_pre, match.query_pre
            if match.query_normed is not match.query_post:
                back = np.argsort(graph.head_axes(match.query_post)).tolist()
                tap = _permuted(graph, _permuted(graph, tap, graph.head_axes(tap)), back)
                tap, layout = graph.clone(match.query_normed, {match.query_post: tap}, {}), match.query_normed
            taps.append(_permuted(graph, tap, graph.head_axes(layout)))
    return taps


def _permuted(graph: Graph, node: Node, axes: list[int]) -> Node:
    return node if axes == [0, 1, 2, 3] else graph.call(torch.ops.aten.permute.default, node, axes)


def tap_only(graph: Graph, matches: list[RopeAttention]) -> None:
    """Make the taps the graph's only outputs (for calibration): what comes after the last query is dropped."""
    taps = tap_prerope(graph, matches)
    graph.outputs = {f"query_pre_{match.attention.layer}": tap for match, tap in zip(matches, taps, strict=True)}
