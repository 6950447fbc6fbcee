"""find_rope: find the rotary embedding in front of every attention, and verify it by probing.

    hidden -> q_proj -> (q_norm) -> [q_pre] -> RoPE(position) -> [query] -> attention

The walk goes up from the attention's query (and key) through everything that depends on the tokens. Operations that
also take a position-only tensor are RoPE's products; the node through which all their data flows is the pre-RoPE
tensor. The subgraph between is then evaluated in float64 on unit vectors at several positions: the match counts only
if the result is a rotation of dim pairs by an angle proportional to the position. So "matched" means "verified",
whatever the model's code looks like.
"""

from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import map_arg

import keysieve.plugins.torch_ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.passes.graph import Graph
from keysieve.passes.result import Attention, Found, Miss, RopeAttention
from keysieve.passes.rope_form import RopeForm

# Position 0 gives the scaling, 1 the frequencies; the others verify that angles grow linearly with the position.
PROBE_POSITIONS = (0, 1, 2, 17, 1000)
FAR = 1 << 24  # a position that no model was made for: frequencies that change with the length have changed there
TOLERANCE = 1e-6
PROJECTIONS = {
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.embedding.default,
    torch.ops.keysieve.attention.default,
}


class _NoRope(Exception):
    """Why a tensor is not the output of a rotary embedding."""

    def __init__(self, node: Node, reason: str):
        super().__init__(reason)
        self.node = node
        self.reason = reason


def find_rope(graph: Graph, attentions: list[Attention]) -> Found[RopeAttention]:
    """Match the RoPE of each attention; a layer without any rotation matches as form "nope"."""
    data = graph.depends_on([graph.inputs["input_ids"]])
    positional = graph.depends_on([graph.inputs["position_ids"]])
    found: Found[RopeAttention] = Found([])
    probed: dict[Any, RopeForm] = {}
    for attention in attentions:
        try:
            query_pre, query_form = _trace(graph, attention.query, data, positional, probed)
            key_pre, key_form = _trace(graph, attention.key, data, positional, probed)
            _same_form(attention, query_form, key_form)
        except _NoRope as miss:
            found.misses.append(Miss(attention.number, miss.node.name, miss.reason))
            continue
        found.matches.append(RopeAttention(attention, query_pre, key_pre, query_form))
    return found


def _trace(
    graph: Graph, post: Node, data: set[Node], positional: set[Node], probed: dict[Any, RopeForm]
) -> tuple[Node, RopeForm]:
    """Walk up from a rotated tensor [B,H,S,D] to the tensor before RoPE; returns it and the verified form.

    probed: forms by subgraph, so that layers with the very same operations are evaluated once.
    """
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    sequence = str(graph.shape(graph.inputs["input_ids"])[1])
    frontier, products = {post}, 0
    refusal: _NoRope | None = None  # the nearest: further up, it is the same for a less telling reason
    counted: Node | None = None
    while True:
        node = max(frontier, key=order.__getitem__)
        if len(frontier) == 1 and products and _is_tensor(node):
            try:
                signature = _signature(graph, node, post)
                if signature not in probed:
                    probed[signature] = probe(graph, node, post)
                return node, probed[signature]
            except _NoRope as refused:
                refusal = refusal or refused  # perhaps a later scale by position; the rotation may still be above
        if node.op == "placeholder" or node.target in PROJECTIONS:
            if products:
                raise refusal or _NoRope(node, "position-dependent products without one pre-RoPE tensor above them")
            if counted is not None:
                raise _NoRope(counted, "depends on the token's index in the input instead of on position_ids")
            head_dim = int(graph.shape(post)[-1])
            return post, RopeForm("nope", head_dim, 0, np.zeros(0))
        frontier.remove(node)
        inputs = node.all_input_nodes
        products += any(i in positional and i not in data for i in inputs)
        for i in inputs:
            if i not in data and i not in positional and _is_tensor(i) and sequence in map(str, graph.shape(i)):
                counted = i
        frontier.update(i for i in inputs if i in data)
        if not frontier:
            raise _NoRope(node, "the attention's input does not depend on the tokens")


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)  # not a size, and not the list that chunk or split gives


def _signature(graph: Graph, pre: Node, post: Node) -> Any:
    """Equal for subgraphs of the same operations on the same tables, whatever their nodes are called."""
    names: dict[Node, Any] = {pre: ("pre", *map(str, graph.shape(pre)))}
    operations: list[tuple[str, str]] = []
    for node in graph.ancestors([post], stop=[pre]):
        if node.op == "placeholder":
            names[node] = node.name
            continue
        names[node] = len(operations)
        arguments = map_arg((node.args, node.kwargs), names.__getitem__)
        operations.append((str(node.target), repr(arguments)))
    return tuple(operations)


def probe(graph: Graph, pre: Node, post: Node) -> RopeForm:
    """Measure the rotation between two nodes on unit vectors; raises _NoRope where it is none.

    The subgraph is linear in `pre`, so its values on the D unit vectors are the matrix M(p) of each position p. It is
    RoPE if M(0) = s I on the rotated dims, and M(p) turns every pair of dims by p * inv_freq.
    """
    matrices = _rotation_matrices(graph, pre, post, PROBE_POSITIONS)  # [P, D, D]: M(p)[out, in]
    _check_length(graph, pre, post, matrices)
    head_dim = matrices.shape[-1]
    at_zero, at_one = matrices[0], matrices[1]
    scaling = float(at_zero[0, 0])
    moved = np.abs(at_one - at_zero).max(axis=1) > TOLERANCE * abs(scaling or 1)
    diagonal = np.diag(at_zero)
    if np.abs(at_zero - np.diag(diagonal)).max() > TOLERANCE:
        raise _NoRope(pre, "RoPE at position 0 is not diagonal (dims are permuted between input and output)")
    rotary_dim = _rotary_dim(at_one, moved, pre)
    if np.abs(diagonal[:rotary_dim] - scaling).max() > TOLERANCE or scaling <= 0:
        raise _NoRope(pre, "RoPE at position 0 does not scale all rotated dims alike")
    if np.abs(diagonal[rotary_dim:] - 1).max(initial=0) > TOLERANCE:
        raise _NoRope(pre, "the dims that are not rotated are scaled")
    for kind in ("half_split", "interleaved"):
        form = RopeForm(kind, head_dim, rotary_dim, np.zeros(rotary_dim // 2), scaling)
        real, imaginary = form.pairs
        inv_freq = np.arctan2(at_one[imaginary, real], at_one[real, real])
        form = RopeForm(kind, head_dim, rotary_dim, inv_freq, scaling)
        error = max(
            # a model's own float32 table is off by the rounding of its angles
            float(np.abs(matrix - rotation_matrix(form, position)).max()) / max(1, position)
            for matrix, position in zip(matrices, PROBE_POSITIONS, strict=True)
        )
        if error < TOLERANCE * max(1.0, scaling):
            return form
    raise _NoRope(pre, "the rotation is neither half-split nor interleaved with angles proportional to the position")


def rotation_matrix(form: RopeForm, position: float) -> np.ndarray:
    """M(position) [D, D] of a form: what probing must find."""
    matrix = np.eye(form.head_dim)
    real, imaginary = form.pairs
    angle = form.inv_freq * position
    matrix[real, real] = matrix[imaginary, imaginary] = form.scaling * np.cos(angle)
    matrix[imaginary, real] = form.scaling * np.sin(angle)
    matrix[real, imaginary] = -form.scaling * np.sin(angle)
    return matrix


def _rotary_dim(at_one: np.ndarray, moved: np.ndarray, pre: Node) -> int:
    """R: the first R dims take part in the rotation."""
    off_diagonal = np.abs(at_one - np.diag(np.diag(at_one))).max(axis=1) > 0
    rotated = np.flatnonzero(moved | off_diagonal)
    if not len(rotated):
        raise _NoRope(pre, "nothing rotates between positions 0 and 1")
    count = len(rotated)
    if count % 2 or rotated[-1] != count - 1:
        raise _NoRope(pre, f"the rotated dims are not the first ones of the head ({count} of {len(at_one)} rotate)")
    return count


def _check_length(graph: Graph, pre: Node, post: Node, matrices: np.ndarray) -> None:
    """Raise _NoRope where the rotation of a token changes when a later one is there, naming the length.

    Keys that are cached would no longer fit: they were rotated when the text was shorter.
    """

    def changed(longest: int) -> bool:
        found = _rotation_matrices(graph, pre, post, (*PROBE_POSITIONS, longest))[:-1]
        return bool(np.abs(found - matrices).max() > TOLERANCE)

    try:
        if not changed(FAR):
            return
    except _NoRope:
        return  # a table ends before; its rows do not depend on each other
    fits, too_long = max(PROBE_POSITIONS), FAR
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (fits, middle) if changed(middle) else (middle, too_long)
    raise _NoRope(
        pre, f"its frequencies change with the length, from {too_long + 1:,} tokens on (longrope or dynamic NTK)"
    )


def _rotation_matrices(graph: Graph, pre: Node, post: Node, probed: tuple[int, ...]) -> np.ndarray:
    """[P, D, D] float64: the linear map from pre to post at every position probed, the same for every head.

    One more batch row holds random vectors, which only that map, applied to every head and position alone, explains.
    """
    batch, sequence = (str(size) for size in graph.shape(graph.inputs["input_ids"]))
    shape = [str(size) for size in graph.shape(pre)]
    post_shape = graph.shape(post)
    head_dim, positions = int(post_shape[-1]), len(probed)
    heads = int(post_shape[1])
    if len(shape) != 4 or shape[-1] != str(head_dim) or {batch, sequence} - set(shape) or str(heads) not in shape:
        raise _NoRope(pre, f"pre-RoPE tensor has shape {shape}, not batch, sequence, {heads} heads and {head_dim} dims")
    unit = torch.eye(head_dim, dtype=torch.float64)[:, None, None].expand(-1, heads, positions, -1)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(1, heads, positions, head_dim, dtype=torch.float64, generator=generator)
    axes = [{batch: 0, sequence: 2}.get(size, 1) for size in shape[:3]] + [3]
    given = {
        pre: torch.cat((unit, mixed)).permute(axes),  # [D+1,H,P,D] in the layout of pre
        graph.inputs["input_ids"]: torch.zeros(head_dim + 1, positions, dtype=torch.long),
        graph.inputs["position_ids"]: torch.tensor(probed).expand(head_dim + 1, positions),
    }
    try:
        result = graph.evaluate(post, given)
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _NoRope(pre, f"the subgraph up to the attention cannot be evaluated alone: {error}") from error
    if list(result.shape) != [head_dim + 1, heads, positions, head_dim]:
        raise _NoRope(pre, f"the subgraph up to the attention gives shape {list(result.shape)}")
    result, mixed_result = result[:-1], result[-1]
    if (result - result[:, :1]).abs().max() > TOLERANCE:
        raise _NoRope(pre, "heads are rotated differently")
    matrices = result[:, 0].permute(1, 2, 0)  # [in, P, out] -> [P, out, in]
    if (torch.einsum("poi,hpi->hpo", matrices, mixed[0]) - mixed_result).abs().max() > TOLERANCE:
        raise _NoRope(pre, "the subgraph up to the attention is not linear, or mixes heads or positions")
    return matrices.numpy()


def _same_form(attention: Attention, query: RopeForm, key: RopeForm) -> None:
    same = (query.kind, query.rotary_dim) == (key.kind, key.rotary_dim) and np.allclose(
        query.inv_freq, key.inv_freq, rtol=1e-9, atol=0
    )
    if not same or abs(query.scaling - key.scaling) > TOLERANCE:
        raise _NoRope(attention.node, f"queries have RoPE {query} but keys have {key}")
