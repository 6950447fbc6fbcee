"""lower_positions: what depends on a token's index in the input comes to depend on position_ids.

    arange(S) -> f -> [B or 1, .., S, ..] -> query
becomes
    position_ids -> f -> [B, .., S, ..] -> query

Without a cache the two are one; in an engine a token's index in the step says nothing about its place in the text.
Matched means verified: f at positions must be, token by token, what f of a longer text is at those indices.
"""

import torch
from torch.fx import Node

from keysieve.passes.find_rope import PROJECTIONS
from keysieve.passes.graph import CANNOT_EVALUATE, Graph
from keysieve.passes.result import Attention

aten = torch.ops.aten
COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
SIZE = 9


def lower_positions(graph: Graph, attentions: list[Attention]) -> int:
    """Rewrite in place between the projections and every attention; returns how many tensors were replaced.

    What cannot be is left alone, and find_rope says so. A graph of fixed sizes is left alone, too.
    """
    batch, sequence = graph.shape(graph.inputs["input_ids"])
    if isinstance(batch, int) or isinstance(sequence, int):
        return 0
    data = graph.depends_on([graph.inputs["input_ids"]])
    positional = graph.depends_on([graph.inputs["position_ids"]])
    closed = [node for node in graph.fx.nodes if node.target in PROJECTIONS]
    counted: dict[Node, None] = {}
    for node in graph.ancestors([end for a in attentions for end in (a.query, a.key)], stop=closed):
        for i in node.all_input_nodes if node in data else ():
            value = i.meta.get("val")
            if i in data or i in positional or not isinstance(value, torch.Tensor):
                continue
            if str(sequence) in map(str, value.shape):
                counted[i] = None
    return sum(_rewrite(graph, node, data) for node in counted)


def _rewrite(graph: Graph, node: Node, data: set[Node]) -> bool:
    batch, sequence = (str(size) for size in graph.shape(graph.inputs["input_ids"]))
    shape = [str(size) for size in graph.shape(node)]
    sources = [n for n in graph.ancestors([node]) if n.target in COUNTS]
    if shape.count(sequence) != 1 or len(sources) != 1 or shape[0] not in (batch, "1") or len(shape) < 2:
        return False
    source, axis = sources[0], shape.index(sequence)
    if [str(size) for size in graph.shape(source)] != [sequence] or not _from_zero(graph, source):
        return False
    positions = graph.inputs["position_ids"]
    user = min((u for u in node.users if u in data), key=list(graph.fx.nodes).index)
    with graph.before(user):
        rows, tokens = graph.size(positions, 0), graph.size(positions, 1)
        flat = graph.call(aten.reshape.default, positions, [-1])  # [B*S]: one long text, so that f needs no batch
        count = graph.size(flat, 0)
        flat = graph.call(aten.to.dtype, flat, source.meta["val"].dtype)
        result = graph.clone(node, {source: flat}, {sequence: count, batch: 1})  # [1, .., B*S, ..]
        rest = [n for n in range(1, len(shape)) if n != axis]
        result = graph.call(aten.permute.default, result, [0, axis, *rest])
        result = graph.call(aten.reshape.default, result, [rows, tokens, *(graph.shape(node)[n] for n in rest)])
        result = graph.call(aten.permute.default, result, [0, *_places(axis, len(shape))])
        result = graph.call(aten.to.dtype, result, node.meta["val"].dtype)
    if not _same(graph, node, result, axis):
        return False  # what was added is dead code
    for reader in [u for u in node.users if u in data]:
        reader.replace_input_with(node, result)
    return True


def _places(axis: int, rank: int) -> list[int]:
    """The permutation, without axis 0, that brings [B, S, rest] back to S at `axis`."""
    rest = iter(range(2, rank))
    return [1 if n == axis else next(rest) for n in range(1, rank)]


def _from_zero(graph: Graph, source: Node) -> bool:
    inputs = {graph.inputs["input_ids"]: torch.zeros(2, SIZE, dtype=torch.long)}
    inputs[graph.inputs["position_ids"]] = inputs[graph.inputs["input_ids"]]
    return torch.equal(graph.evaluate(source, inputs).long(), torch.arange(SIZE))


def _same(graph: Graph, node: Node, result: Node, axis: int) -> bool:
    """Whether result at any positions is node of a longer text at those indices."""
    ids, positions = graph.inputs["input_ids"], graph.inputs["position_ids"]
    places = torch.tensor([[5, 0, 8, 7, 1], [3, 4, 5, 6, 2]])
    text = torch.zeros(2, SIZE, dtype=torch.long)
    try:
        whole = graph.evaluate(node, {ids: text, positions: text})
        found = graph.evaluate(result, {ids: text[:, :5], positions: places})
        wanted = torch.cat([whole[:1].index_select(axis, row) for row in places])
    except CANNOT_EVALUATE:
        return False
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=1e-6)
