"""Running a captured graph node by node, so that its outputs are heard one at a time and nothing is held too long."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Interpreter, Node

from keysieve.passes.graph import Graph

Hear = Callable[[int, int, torch.Tensor], None]
"""hear(number of the batch, number of the output, its value)"""


def run_nodes(
    graph: Graph,
    nodes: list[Node],
    env: dict[Node, Any],
    last_use: dict[Node, Node],
    taps: dict[Node, list[int]],
    hear: Callable[[int, torch.Tensor], None],
) -> None:
    """Run calls of a closed graph, in graph order, on the values of `env`, which become those that later calls need.

    Every output among the nodes is told to hear(its number, its value). last_use, taps: as of last_uses and taps_of.
    """
    interpreter = Interpreter(graph.module, garbage_collect_values=False)
    interpreter.env = env
    for node in nodes:
        env[node] = interpreter.run_node(node)
        for index in taps.get(node, ()):
            hear(index, env[node])
        for read in {node, *node.all_input_nodes}:
            if last_use[read] is node:
                del env[read]


def taps_of(graph: Graph) -> dict[Node, list[int]]:
    """The nodes that are outputs, with their numbers."""
    taps: dict[Node, list[int]] = {}
    for index, tap in enumerate(graph.output_node.args[0]):
        taps.setdefault(tap, []).append(index)
    return taps


def last_uses(graph: Graph) -> dict[Node, Node]:
    """For each node, the last one that reads it; for one that only the output reads, itself."""
    last = {}
    for node in graph.fx.nodes:
        last[node] = node
        if node.op != "output":
            for read in node.all_input_nodes:
                last[read] = node
    return last
