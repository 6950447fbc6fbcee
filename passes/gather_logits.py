"""gather_logits: compute logits only at the token positions that are asked for.

    hidden [B,S,H] -> lm_head -> logits [B,S,V]
becomes
    hidden [B,S,H] -> gather(logits_at [B,N]) -> lm_head -> logits [B,N,V] float32
"""

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph

aten = torch.ops.aten
HEADS = (aten.linear.default, aten.matmul.default, aten.mm.default)
ELEMENTWISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
}


def gather_logits(graph: Graph) -> None:
    """Add input logits_at [B,N] int64 (indices into the S tokens of this step)."""
    batch = graph.shape(graph.inputs["input_ids"])[0]
    index = graph.input("logits_at", (batch, graph.symbol("N")), torch.int64)
    logits = graph.outputs["logits"]
    head = _head(logits)
    # Where something else than elementwise operations follows the head, gather at the end: slower, and right.
    source = head.args[0] if head is not None else logits
    with graph.fx.inserting_after(source):
        anchor = graph.fx.call_function(torch.ops.aten.alias.default, (source,))  # a place to insert behind
    with graph.before(anchor):
        wide = graph.call(aten.unsqueeze.default, index, 2)
        wide = graph.call(aten.expand.default, wide, [-1, -1, graph.shape(source)[2]])  # type: ignore[arg-type]
        gathered = graph.call(aten.gather.default, source, 1, wide)
    graph.fx.erase_node(anchor)
    if head is not None:
        head.replace_input_with(source, gathered)  # type: ignore[arg-type]
    else:
        logits = gathered
    with graph.before(graph.output_node):
        graph.outputs["logits"] = _to_float32(graph, logits)


def _head(logits: Node) -> Node | None:
    node = logits
    while node.target in ELEMENTWISE:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target in HEADS else None


def _to_float32(graph: Graph, node: Node) -> Node:
    if node.meta["val"].dtype == torch.float32:
        return node
    return graph.call(aten.to.dtype, node, torch.float32)
