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
    head = _head(graph, logits)
    # Where something else than elementwise operations follows the head, gather at the end: slower, and right.
    source = head.args[0] if head is not None else logits
    with graph.before(source.next):  # type: ignore[union-attr]
        wide = graph.call(aten.unsqueeze.default, index, 2)
        wide = graph.call(aten.expand.default, wide, [-1, -1, graph.shape(source)[2]])  # type: ignore[arg-type]
        gathered = graph.call(aten.gather.default, source, 1, wide)
    if head is not None:
        head.replace_input_with(source, gathered)  # type: ignore[arg-type]
        _refresh(graph, head, logits)
    else:
        logits = gathered
    with graph.before(graph.output_node):
        graph.outputs["logits"] = _to_float32(graph, logits)


def _head(graph: Graph, logits: Node) -> Node | None:
    """The projection that gives the logits, if nothing behind it needs to know which token a row is of."""
    node = logits
    while node.target in ELEMENTWISE:
        first, *others = node.all_input_nodes
        if node.args[0] is not first or any(len(graph.shape(other)) > 1 for other in others):
            return None
        node = first
    return node if node.target in HEADS else None


def _refresh(graph: Graph, head: Node, logits: Node) -> None:
    """Recompute the shapes from the head to the logits, which now have N rows."""
    chain = [logits]
    while chain[-1] is not head:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    for node in reversed(chain):
        graph.refresh(node)


def _to_float32(graph: Graph, node: Node) -> Node:
    if node.meta["val"].dtype == torch.float32:
        return node
    return graph.call(aten.to.dtype, node, torch.float32)
