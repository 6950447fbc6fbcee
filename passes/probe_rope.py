"""probe_rope: measure the rotation between two nodes by evaluating them in float64 on unit vectors."""

import numpy as np
import torch
from torch.fx import Node

from keysieve.passes.graph import CANNOT_EVALUATE, Graph
from keysieve.passes.rope_form import RopeForm

# Position 0 gives the scaling, 1 the frequencies; the others verify that angles grow linearly with the position.
PROBE_POSITIONS = (0, 1, 2, 17, 1000)
FAR = 1 << 24  # a position that no model was made for: frequencies that change with the length have changed there
TOLERANCE = 1e-6


class NoRope(Exception):
    """Why a tensor is not the output of a rotary embedding."""

    def __init__(self, node: Node, reason: str):
        super().__init__(reason)
        self.node = node
        self.reason = reason


def probe(graph: Graph, pre: Node, post: Node, heads: int) -> RopeForm:
    """Measure the rotation between two nodes on unit vectors; raises NoRope where it is none.

    The subgraph is linear in `pre`, so its values on the D unit vectors are the matrix M(p) of each position p. It is
    RoPE if M(0) only permutes the dims, scales the rotated ones by s, and M(p) turns every pair by p * inv_freq.
    """
    matrices = _rotation_matrices(graph, pre, post, heads, PROBE_POSITIONS)  # [P, D, D]: M(p)[out, in]
    _check_length(graph, pre, post, heads, matrices)
    head_dim = matrices.shape[-1]
    layout = np.abs(matrices[0]).argmax(1)
    dims = np.arange(head_dim)
    scales = matrices[0][dims, layout]
    alone = matrices[0].copy()
    alone[dims, layout] = 0
    if np.abs(alone).max() > TOLERANCE or len(set(layout)) < head_dim or scales.min() <= TOLERANCE:
        raise NoRope(pre, "RoPE at position 0 is no permutation of the head's dims")
    inverse = np.argsort(layout)
    scales = scales[inverse]
    at_one = matrices[1][inverse] / scales[:, None]  # [D, D] in pre-RoPE dims
    moved = np.abs(matrices[1:] - matrices[0]).max((0, 2))[inverse] > TOLERANCE * scales
    linked = np.abs(at_one - np.diag(np.diag(at_one))) > 0
    rotated = np.flatnonzero(moved | linked.any(1))
    if not len(rotated):
        raise NoRope(pre, "nothing rotates between positions 0 and 1")
    scaling = float(scales[rotated[0]])
    if np.abs(scales[rotated] - scaling).max() > TOLERANCE:
        raise NoRope(pre, "RoPE at position 0 does not scale all rotated dims alike")
    if np.abs(np.delete(scales, rotated) - 1).max(initial=0) > TOLERANCE:
        raise NoRope(pre, "the dims that are not rotated are scaled")
    partner = linked.argmax(1)
    if (linked[rotated].sum(1) != 1).any() or (partner[partner[rotated]] != rotated).any():
        raise NoRope(pre, "the rotated dims do not turn in pairs")
    real = rotated[rotated < partner[rotated]]
    imaginary = partner[real]
    inv_freq = np.arctan2(at_one[imaginary, real], at_one[real, real])
    pairs = tuple(map(int, real)), tuple(map(int, imaginary))
    form = RopeForm.of_pairs(*pairs, tuple(map(int, layout)), inv_freq, scaling)
    for matrix, position in zip(matrices, PROBE_POSITIONS, strict=True):
        # a model's own float32 table is off by the rounding of its angles
        error = float(np.abs(matrix - rotation_matrix(form, position)).max()) / max(1, position)
        if error >= TOLERANCE * max(1.0, scaling):
            raise NoRope(pre, "the pairs of dims are not turned by angles proportional to the position")
    return form


def rotation_matrix(form: RopeForm, position: float) -> np.ndarray:
    """M(position) [D, D] of a form, from the pre-RoPE head to the rotated one: what probing must find."""
    matrix = np.eye(form.head_dim)
    real, imaginary = form.pairs
    angle = form.inv_freq * position
    matrix[real, real] = matrix[imaginary, imaginary] = form.scaling * np.cos(angle)
    matrix[imaginary, real] = form.scaling * np.sin(angle)
    matrix[real, imaginary] = -form.scaling * np.sin(angle)
    return matrix[form.source]


def _check_length(graph: Graph, pre: Node, post: Node, heads: int, matrices: np.ndarray) -> None:
    """Raise NoRope where the rotation of a token changes when a later one is there, naming the length.

    Keys that are cached would no longer fit: they were rotated when the text was shorter.
    """

    def changed(longest: int) -> bool:
        found = _rotation_matrices(graph, pre, post, heads, (*PROBE_POSITIONS, longest))[:-1]
        return bool(np.abs(found - matrices).max() > TOLERANCE)

    try:
        if not changed(FAR):
            return
    except NoRope:
        return  # a table ends before; its rows do not depend on each other
    fits, too_long = max(PROBE_POSITIONS), FAR
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (fits, middle) if changed(middle) else (middle, too_long)
    raise NoRope(
        pre, f"its frequencies change with the length, from {too_long + 1:,} tokens on (longrope or dynamic NTK)"
    )


def _rotation_matrices(graph: Graph, pre: Node, post: Node, heads: int, probed: tuple[int, ...]) -> np.ndarray:
    """[P, D, D] float64: the linear map from pre to post at every position probed, the same for every head.

    One more batch row holds random vectors, which only that map, applied to every head and position alone, explains.
    """
    batch, sequence = (str(size) for size in graph.shape(graph.inputs["input_ids"]))
    shapes = [[str(size) for size in graph.shape(node)] for node in (pre, post)]
    head_dim, positions = graph.shape(post)[-1], len(probed)
    for shape in shapes:
        if sorted(shape[:3]) != sorted([batch, sequence, str(heads)]) or shape[3:] != [str(head_dim)]:
            raise NoRope(
                pre, f"pre-RoPE tensor has shape {shape}, not batch, sequence, {heads} heads and {head_dim} dims"
            )
    unit = torch.eye(head_dim, dtype=torch.float64)[:, None, None].expand(-1, heads, positions, -1)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(1, heads, positions, head_dim, dtype=torch.float64, generator=generator)
    axes = np.argsort(graph.head_axes(pre)).tolist()
    given = {
        pre: torch.cat((unit, mixed)).permute(axes),  # [D+1,H,P,D] in the layout of pre
        graph.inputs["input_ids"]: torch.zeros(head_dim + 1, positions, dtype=torch.long),
        graph.inputs["position_ids"]: torch.tensor(probed).expand(head_dim + 1, positions),
    }
    try:
        result = graph.evaluate(post, given).permute(graph.head_axes(post))
    except CANNOT_EVALUATE as error:
        raise NoRope(pre, f"the subgraph up to the attention cannot be evaluated alone: {error}") from error
    if list(result.shape) != [head_dim + 1, heads, positions, head_dim]:
        raise NoRope(pre, f"the subgraph up to the attention gives shape {list(result.shape)}")
    result, mixed_result = result[:-1], result[-1]
    if (result - result[:, :1]).abs().max() > TOLERANCE:
        raise NoRope(pre, "heads are rotated differently")
    matrices = result[:, 0].permute(1, 2, 0)  # [in, P, out] -> [P, out, in]
    if (torch.einsum("poi,hpi->hpo", matrices, mixed[0]) - mixed_result).abs().max() > TOLERANCE:
        raise NoRope(pre, "the subgraph up to the attention is not linear, or mixes heads or positions")
    return matrices.numpy()
