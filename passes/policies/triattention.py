"""TriAttention (arXiv 2604.04921): score a key by the trigonometric series of its layer's query centre.

With c = E[q] (complex pairs, pre-RoPE), T the position of the next token and m_f = mean over the future offsets d of
exp(i w_f d), the score of a *cached, rotated* key k~ is linear in it:

    S = <RoPE_T(c m), k~> + sum_f s (E|q_f| - |E q_f|) |k~_f|

RoPE_T is the model's own RoPE subgraph, cloned and fed with c m, so every RoPE form is right by construction. Dims
that are not rotated join the dot product as they are. For the maximum over offsets, every offset is a row of its own.
Where arrange_heads permuted the keys, the centre is permuted alike once it is rotated.

Centres are constants from a statistics file, or (online) state of the sequence: a mean of its own pre-RoPE queries
that forgets half in 128 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from keysieve.errors import MatchError
from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group
from keysieve.passes.insert_cache import Cache
from keysieve.passes.policies import ScoreInputs
from keysieve.passes.result import RopeAttention
from keysieve.passes.rope_form import RopeForm
from keysieve.passes.tap_prerope import tap_prerope

aten = torch.ops.aten
HALF_LIFE = 128.0  # tokens


@dataclass(frozen=True)
class QueryCentres:
    """Calibrated centres of a group of layers: mean [L,Hq,D] in pre-RoPE layout, magnitude [L,Hq,R/2] = E|q_f|."""

    mean: np.ndarray
    magnitude: np.ndarray


@dataclass(frozen=True)
class TriAttention:
    """Options of the score: future offsets in tokens, "mean" or "max" over them, and the two terms."""

    offsets: list[int]
    aggregation: str = "mean"
    trig: bool = True
    norm: bool = True


def triattention(
    graph: Graph,
    cache: Cache,
    group: Group,
    options: TriAttention,
    centres: QueryCentres | None,
) -> ScoreInputs:
    """Build the rotated centres of a group. centres None: online, with the state inputs centre and magnitude."""
    form, matches = common_form(group), group.matches
    if any(match.arranged for match in matches):
        form = replace(form, kind="half_split", real=(), imaginary=(), layout=())
    if centres is None:
        mean, magnitude = _online_centres(graph, cache, group, form)
    else:
        mean = graph.constant("query_mean", torch.from_numpy(centres.mean[:, None]).float())  # [L,1,Hq,D]
        magnitude = graph.constant("query_magnitude", torch.from_numpy(centres.magnitude[:, None]).float())
    with graph.before(graph.output_node):
        mean = _by_form(graph, matches, mean, lambda part, match, _: _arranged(graph, part, match))
        centre = _rotated_centre(graph, cache, matches, options, form, mean)
        weight = _norm_weight(graph, matches, options, form, mean, magnitude)
    return ScoreInputs("trig", centre, weight, form.rotary_dim, form.interleaved)


def check_rotation(matches: list[RopeAttention]) -> None:
    """Raises MatchError where none of the layers that evict rotates."""
    if all(match.form.kind == "nope" for match in matches):
        raise MatchError(
            "no layer that evicts has a rotary embedding, so there is no series in the distance to score with; choose "
            "--policy key-norm or streaming"
        )


def common_form(group: Group) -> RopeForm:
    """The form of the first rotated layer; where none of the group rotates, one band, which _norm_weight leaves out."""
    rotated = (match.form for match in group.matches if match.form.kind != "nope")
    return next(rotated, RopeForm("half_split", group.head_dim, 2, np.zeros(1)))


def offset_factors(form: RopeForm, offsets: list[int], aggregation: str) -> np.ndarray:
    """m [J, R/2] complex128: exp(i w_f d), averaged over the offsets (J = 1) or one row each."""
    factors = np.exp(1j * np.outer(offsets, form.inv_freq))
    return factors.mean(0, keepdims=True) if aggregation == "mean" else factors


def _rotated_centre(
    graph: Graph, cache: Cache, matches: list[RopeAttention], options: TriAttention, form: RopeForm, mean: Node
) -> Node:
    """mean [L,B or 1,Hq,D] -> RoPE_T(mean * m) [L,B,Hq,J,D], both as the cached keys are arranged."""
    call = graph.call
    shifted = _shift(graph, matches, options, form, mean)
    batch = graph.size(graph.inputs["input_ids"], 0)
    rows = graph.shape(shifted)[3]

    def rotated(part: Node, match: RopeAttention, layers: int) -> Node:
        part = call(aten.expand.default, part, [-1, batch, -1, -1, -1])
        if match.form.kind == "nope":
            return part
        if not match.arranged:
            return _rotate(graph, cache, match, part, layers, rows)
        before, after = match.form.arranged
        return _dims(graph, _rotate(graph, cache, match, _dims(graph, part, np.argsort(before)), layers, rows), after)

    return _by_form(graph, matches, shifted, rotated)


def _by_form(
    graph: Graph, matches: list[RopeAttention], layers: Node, change: Callable[[Node, RopeAttention, int], Node]
) -> Node:
    """change(part [l,...], a match, l) on the layers of each form alone; layers [L,...] come back in their order."""
    groups: dict[Any, list[int]] = {}
    for index, match in enumerate(matches):
        form = match.form
        key = (form.kind, form.inv_freq.tobytes(), form.scaling, form.pairs[0].tobytes(), form.layout)
        groups.setdefault(key, []).append(index)
    parts, order = [], []
    for indices in groups.values():
        parts.append(change(_pick(graph, layers, indices), matches[indices[0]], len(indices)))
        order.extend(indices)
    if len(parts) == 1:
        return parts[0]
    return _pick(graph, graph.call(aten.cat.default, parts, 0), list(np.argsort(order)))


def _arranged(graph: Graph, node: Node, match: RopeAttention) -> Node:
    """Pre-RoPE vectors [...,D] as the cached keys are arranged."""
    return _dims(graph, node, match.form.arranged[0]) if match.arranged else node


def _dims(graph: Graph, node: Node, order: np.ndarray) -> Node:
    """The last axis in that order."""
    index = graph.constant(f"dims_{len(graph.specs)}", torch.from_numpy(order))
    return graph.call(aten.index_select.default, node, len(graph.shape(node)) - 1, index)


def _shift(graph: Graph, matches: list[RopeAttention], options: TriAttention, form: RopeForm, mean: Node) -> Node:
    """mean [L,b,Hq,D] times the offset factors of each layer -> [L,b,Hq,J,D]; un-rotated dims times 1."""
    rows = 1 if options.aggregation == "mean" else len(options.offsets)
    head_dim = matches[0].form.head_dim
    real = np.ones((len(matches), 1, 1, rows, head_dim))
    imaginary = np.zeros_like(real)
    re, im = form.pairs
    partner = np.arange(head_dim)
    partner[re], partner[im] = im, re
    for index, match in enumerate(matches):
        if match.form.kind == "nope":
            continue
        m = offset_factors(match.form, options.offsets, options.aggregation)
        real[index, 0, 0][:, re] = real[index, 0, 0][:, im] = m.real
        # (a + ib)(x + iy) = (ax - by) + i(bx + ay)
        imaginary[index, 0, 0][:, re] = -m.imag
        imaginary[index, 0, 0][:, im] = m.imag
    if not options.trig:
        real[:], imaginary[:] = 0.0, 0.0
    call = graph.call
    real_node = graph.constant("offset_real", torch.from_numpy(real).float())
    imaginary_node = graph.constant("offset_imaginary", torch.from_numpy(imaginary).float())
    mean = call(aten.unsqueeze.default, mean, 3)
    turned = _dims(graph, mean, partner)
    return call(aten.add.Tensor, call(aten.mul.Tensor, mean, real_node), call(aten.mul.Tensor, turned, imaginary_node))


def _rotate(graph: Graph, cache: Cache, match: RopeAttention, centre: Node, layers: int, rows: int) -> Node:
    """The model's own RoPE at position T on centre [L,B,Hq,J,D]: layers and rows take the place of the sequence."""
    call = graph.call
    sequence = graph.shape(cache.positions)[1]
    batch = graph.size(cache.position, 0)
    heads, head_dim = match.attention.query_heads, match.form.head_dim
    flat = call(aten.permute.default, centre, [1, 2, 0, 3, 4])
    flat = call(aten.reshape.default, flat, [batch, heads, layers * rows, head_dim])  # [B,Hq,L*J,D]
    axes = graph.head_axes(match.query_pre)
    if axes != [0, 1, 2, 3]:
        flat = call(aten.permute.default, flat, np.argsort(axes).tolist())
    now = call(aten.unsqueeze.default, cache.position, 1)
    now = call(aten.expand.default, now, [-1, layers * rows])
    given = {match.query_pre: flat, cache.positions: now}
    turned = graph.clone(match.query_post, given, {str(sequence): layers * rows})
    axes = graph.head_axes(match.query_post)
    if axes != [0, 1, 2, 3]:
        turned = call(aten.permute.default, turned, axes)
    turned = call(aten.reshape.default, turned, [batch, heads, layers, rows, head_dim])
    return call(aten.permute.default, turned, [2, 0, 1, 3, 4])


def _norm_weight(
    graph: Graph, matches: list[RopeAttention], options: TriAttention, form: RopeForm, mean: Node, magnitude: Node
) -> Node:
    """s (E|q_f| - |E q_f|) [L,B,Hq,R/2]; zero for layers without RoPE and where the norm term is off."""
    call = graph.call
    scale = np.array([m.form.scaling if m.form.kind != "nope" and options.norm else 0.0 for m in matches])
    scale_node = graph.constant("norm_scale", torch.from_numpy(scale).float().view(-1, 1, 1, 1))
    excess = call(aten.sub.Tensor, magnitude, _pair_magnitude(graph, form, mean))
    # E|q_f| >= |E q_f|; rounding may say otherwise
    weight = call(aten.mul.Tensor, call(aten.clamp.default, excess, 0.0), scale_node)
    batch = graph.size(graph.inputs["input_ids"], 0)
    return call(aten.expand.default, weight, [-1, batch, -1, -1])


def _pair_magnitude(graph: Graph, form: RopeForm, vectors: Node) -> Node:
    """|x_f| of the last axis: [..., D] -> [..., R/2]."""
    call = graph.call
    axis = len(graph.shape(vectors)) - 1
    if form.interleaved:
        real = call(aten.slice.Tensor, vectors, axis, 0, form.rotary_dim, 2)
        imaginary = call(aten.slice.Tensor, vectors, axis, 1, form.rotary_dim, 2)
    else:
        real = call(aten.slice.Tensor, vectors, axis, 0, form.rotary_dim // 2)
        imaginary = call(aten.slice.Tensor, vectors, axis, form.rotary_dim // 2, form.rotary_dim)
    squares = call(aten.add.Tensor, call(aten.mul.Tensor, real, real), call(aten.mul.Tensor, imaginary, imaginary))
    return call(aten.sqrt.default, squares)


def _online_centres(graph: Graph, cache: Cache, group: Group, form: RopeForm) -> tuple[Node, Node]:
    """Running means of the sequence's own pre-RoPE queries, as state: centre [L,B,Hq,D], magnitude [L,B,Hq,R/2].

    Token by token c <- c a + (1 - a) q with a = 0.5 ** (1 / 128), summed in one go over the step's `count` tokens.
    """
    matches, layers, heads = group.matches, len(group.matches), group.query_heads
    batch = graph.shape(graph.inputs["input_ids"])[0]
    head_dim, bands = form.head_dim, form.rotary_dim // 2
    centre = graph.input(f"centre{group.suffix}", (layers, batch, heads, head_dim), torch.float32)
    magnitude = graph.input(f"magnitude{group.suffix}", (layers, batch, heads, bands), torch.float32)
    taps = tap_prerope(graph, matches)
    call = graph.call
    rate = float(np.log(0.5) / HALF_LIFE)
    with graph.before(graph.output_node):
        count = call(aten.unsqueeze.default, call(aten.to.dtype, cache.count, torch.float32), 1)  # [B,1]
        steps = call(aten.arange.default, graph.size(graph.inputs["input_ids"], 1), dtype=torch.float32)
        age = call(aten.sub.Tensor, call(aten.sub.Tensor, count, steps), 1.0)  # [B,S]: tokens since token s
        kept = call(aten.exp.default, call(aten.mul.Tensor, call(aten.clamp.default, age, 0.0), rate))
        share = call(aten.mul.Tensor, kept, 1.0 - float(np.exp(rate)))
        valid = call(aten.to.dtype, call(aten.ge.Scalar, age, 0.0), torch.float32)
        share = call(aten.mul.Tensor, share, valid)
        share = call(aten.unsqueeze.default, call(aten.unsqueeze.default, share, 1), 1)  # [B,1,1,S]
        decay = call(aten.exp.default, call(aten.mul.Tensor, count, rate))
        decay = call(aten.unsqueeze.default, decay, 2)  # [B,1,1]
        floats = [call(aten.to.dtype, tap, torch.float32) for tap in taps]
        queries = call(aten.cat.default, floats, 1)  # [B,L*Hq,S,D]
        paired = queries
        if any(match.arranged for match in matches):
            arranged = [_arranged(graph, tap, match) for tap, match in zip(floats, matches, strict=True)]
            paired = call(aten.cat.default, arranged, 1)
        batch_size = graph.size(graph.inputs["input_ids"], 0)
        states = []
        for state, values, width in (
            (centre, queries, head_dim),
            (magnitude, _pair_magnitude(graph, form, paired), bands),
        ):
            new = call(aten.matmul.default, share, values)  # [B,L*Hq,1,width]
            new = call(aten.reshape.default, new, [batch_size, layers, heads, width])
            new = call(aten.permute.default, new, [1, 0, 2, 3])
            state_next = call(aten.add.Tensor, call(aten.mul.Tensor, state, decay), new)
            graph.outputs[f"{state.name}_next"] = state_next
            states.append(state_next)
    return states[0], states[1]


def _pick(graph: Graph, node: Node, indices: list[int]) -> Node:
    """Rows of the first axis, in that order; the node itself where that changes nothing."""
    if list(indices) == list(range(graph.shape(node)[0])):
        return node
    index = graph.constant(f"layers_{len(graph.specs)}", torch.tensor([int(i) for i in indices]))
    return graph.call(aten.index_select.default, node, 0, index)
