"""find_latents: layers whose keys and values are expanded from one narrower latent (multi-head latent attention, MLA).

    hidden -> linear -> (norm) -> [latent] -> linear -> key, value

The engine caches what the attention reads, so such a layer's rows are wider than what they were made from.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.result import Attention

LINEAR = torch.ops.aten.linear.default


def find_latents(graph: Graph, attentions: list[Attention]) -> dict[int, int]:
    """Layer -> width of its latent in numbers a token, for the layers that have one."""
    widths = {attention.layer: _latent_width(graph, attention) for attention in attentions}
    return {layer: width for layer, width in widths.items() if width}


def _latent_width(graph: Graph, attention: Attention) -> int:
    """0 unless value and (part of) key are linear in what one linear layer has narrowed."""
    up = _linears_above(graph, attention.value)
    if len(up) != 1:
        return 0
    latent: Node = up.pop().args[0]  # type: ignore[assignment]
    down = _linears_above(graph, latent)
    if len(down) != 1:
        return 0
    (source,) = (graph.shape(linear.args[0])[-1] for linear in down)  # type: ignore[arg-type]
    of_key = _linears_above(graph, attention.key) - down
    if not any(_linears_above(graph, linear.args[0]) == down for linear in of_key):  # type: ignore[arg-type]
        return 0
    width, row = int(graph.shape(latent)[-1]), attention.kv_heads * (attention.head_dim + attention.value_dim)
    return width if width < min(source, row) else 0


def _linears_above(graph: Graph, node: Node) -> set[Node]:
    """The linear layers nearest to a node on all ways up from it."""
    found, seen, todo = set(), set(), [node]
    while todo:
        node = todo.pop()
        if node in seen or node in graph.tensors:
            continue
        seen.add(node)
        if node.target is LINEAR:
            found.add(node)
        else:
            todo.extend(node.all_input_nodes)
    return found
