"""export for ONNX Runtime: the graph of model.onnx in the operators that run fastest there, on the same weights.

    query, key, value -> RoPE -> KeySieveUpdate -> Attention
becomes
    query, key, value, cos, sin -> KeySieveAttend
and
    MatMul, MatMulNBits
become
    KeySieveMatMul, KeySieveLinear

which the custom-op library of keysieve.plugins.onnxruntime brings: one node a layer instead of some thirty, no copy of
a cache, work for the rows held instead of for the capacity, and weights that are read where they are mapped.
RoPE stays in front where it is not half-split over all dims, and layers of chunks stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from keysieve.export.read_in_place import read_in_place
from keysieve.export.rewriting import both_ways, number, producer, take_over
from keysieve.export.when_due import compute_when_due
from keysieve.passes.result import Attention
from keysieve.passes.split_heads import HEADS
from keysieve.plugins.contract import ATTEND, DOMAIN, NAMESPACE, NODES, UPDATE

TOKENS_FIRST = (0, 2, 1, 3)  # [B,H,S,D] <-> [B,S,H,D]


def export_for_onnxruntime(model: Path, output: Path, attentions: Sequence[Attention]) -> int:
    """Write the graph of `model` for ONNX Runtime with the library to `output`, beside it: they share their weights.

    attentions: those of the model, as they were found.
    Returns the number of layers whose attention is one node now.
    """
    graph_model = ir.load(model)
    graph = graph_model.graph
    fused = 0
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type == UPDATE.name]:
        name = node.inputs[5].name  # type: ignore[union-attr]
        attention = next((attention for attention in attentions if name == f"key_{attention.cache}"), None)
        if attention is None:  # row states, which nothing attends to
            continue
        fused += not attention.chunk and _fuse_attention(graph, node, attention)
    for node in graph:
        node.overload = ""  # the library's ops serve every shape
    _divide(graph)
    read_in_place(graph)
    compute_when_due(graph)
    common.RemoveUnusedNodesPass()(graph_model)
    for identifier in [key for key in graph_model.functions if key[1] in {node.name for node in NODES}]:
        del graph_model.functions[identifier]  # the library has these
    ir.save(graph_model, output)
    return fused


@dataclass(frozen=True)
class _Read:
    """Attention over a cache in the graph: its query and result [B,Hq,S,...], and the logits of its sinks [Hq]."""

    query: ir.Value | None
    result: ir.Value
    sinks: ir.Value | None = None


def _fuse_attention(graph: ir.Graph, update: ir.Node, attention: Attention) -> bool:
    """Put KeySieveAttend in place of the update, the attention behind it, and RoPE where it has the half-split form."""
    key_out, value_out = update.outputs
    read_cache = _read_of(key_out, value_out)
    if read_cache is None or (read_cache.sinks is None) != (attention.sinks is None):
        return False
    query, (*new_rows, length, plan, keep, key, value) = read_cache.query, update.inputs
    # Where the caches are of another type, the op itself rounds the new rows.
    key_new, value_new = (cast.inputs[0] if (cast := producer(row, "Cast")) else row for row in new_rows)
    kv_heads = attention.kv_heads
    if attention.heads is not None:
        whole = [_before_heads(value) for value in (query, key_new, value_new)]
        if None in whole:
            return False
        query, key_new, value_new = whole
        kv_heads = int(key_new.shape[1])  # type: ignore[union-attr,index,arg-type]
    query_rope, key_rope = _half_split(query), _half_split(key_new)
    cos = sin = None
    if query_rope and key_rope and query_rope[1:] == key_rope[1:]:
        (query, cos, sin), (key_new, _, _) = query_rope, key_rope
    new: list[ir.Node] = []
    tokens_first = [_tokens_first(value, new) for value in (query, key_new, value_new)]
    attributes: dict[str, int | float | str] = {
        "layer": update.attributes["layer"].as_int(),
        "scale": attention.scale,
        "softcap": float(attention.softcap),
        "window": attention.window,
        "kv_heads": kv_heads,
        "heads": ",".join(map(str, attention.heads or ())),
        "plugin_version": ATTEND.version,
        "plugin_namespace": NAMESPACE,
    }
    inputs = [*(_packed(tokens_first) or tokens_first), length, plan, keep, key, value, cos, sin, read_cache.sinks]
    attend = ir.node(ATTEND.name, inputs, attributes, domain=DOMAIN, num_outputs=3, name=update.name)
    read, *caches = attend.outputs
    result = read_cache.result
    place: ir.Node = result.producer()  # type: ignore[assignment]
    back = ir.node("Transpose", [read], attributes={"perm": TOKENS_FIRST})
    graph.insert_after(place, [*new, attend, back])
    for use in list(result.uses()):
        if _is_transpose(use.node):
            take_over(use.node.outputs[0], read)
    take_over(result, back.outputs[0])
    for old, cache in zip((key_out, value_out), caches, strict=True):
        take_over(old, cache)
    return True


def _read_of(key: ir.Value, value: ir.Value) -> _Read | None:
    """The one attention that reads both caches, cast or not: a node, or insert_cache's own operations."""
    readers = [use.node for use in _through_casts(value)]
    for use in _through_casts(key):
        if use.node.op_type == "Attention" and use.node in readers:
            return _Read(use.node.inputs[0], use.node.outputs[0])
        if use.node.op_type != "Transpose":
            continue
        product = next((user.node for user in use.node.outputs[0].uses() if user.node.op_type == "MatMul"), None)
        weighted = next((node for node in readers if node.op_type == "MatMul"), None)
        if product is None or weighted is None:
            continue
        query, weights = producer(product.inputs[0], "Reshape"), weighted.inputs[0]
        result = next((user.node for user in weighted.outputs[0].uses() if user.node.op_type == "Reshape"), None)
        softmax = _first_above(weights, "Softmax")
        if query is not None and result is not None and softmax is not None:
            sinks = producer(softmax.inputs[0], "Concat")
            return _Read(query.inputs[0], result.outputs[0], _first_of_one_axis(sinks.inputs[1]) if sinks else None)
    return None


def _first_above(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of that kind that makes the value, up the first inputs of others."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type != op_type:
        first = node.inputs[0] if node.inputs else None
        node = first.producer() if first is not None else None
    return node


def _first_of_one_axis(value: ir.Value | None) -> ir.Value | None:
    """The value of one axis from which this one is reshaped and expanded."""
    while value is not None and len(value.shape or ()) != 1:
        node = value.producer()
        value = node.inputs[0] if node is not None else None
    return value


def _through_casts(value: ir.Value) -> list[Any]:
    found: list[Any] = []
    for use in value.uses():
        found += _through_casts(use.node.outputs[0]) if use.node.op_type == "Cast" else [use]
    return found


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    """What split_heads picked the heads from: [B,H,S,D] with those of all of the layer."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Slice", "Gather"):
        return None
    axis = number(node.inputs[3]) if node.op_type == "Slice" else node.attributes["axis"].as_int()
    return node.inputs[0] if axis == HEADS else None


def _half_split(rotated: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, cos and sin [B,S,D] of x * cos + concat(-x[half:], x[:half]) * sin; None for any other form."""
    total = producer(rotated, "Add")
    for first, second in ((0, 1), (1, 0)) if total else ():
        plain, turned = (producer(total.inputs[i], "Mul") for i in (first, second))  # type: ignore[union-attr]
        for x, cos in both_ways(plain):
            for swapped, sin in both_ways(turned):
                tables = [producer(table, "Unsqueeze") for table in (cos, sin)]
                if all(tables) and _swapped_halves(swapped, x):
                    cosine, sine = (table.inputs[0] for table in tables)  # type: ignore[union-attr]
                    if len(cosine.shape or ()) == len(sine.shape or ()) == 3:  # type: ignore[union-attr]
                        return x, cosine, sine  # type: ignore[return-value]
    return None


def _swapped_halves(value: ir.Value, x: ir.Value) -> bool:
    """Whether value is concat(-x[half:], x[:half]) along the last of four axes."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in (-1, 3):
        return False
    negative = producer(concat.inputs[0], "Neg")
    upper = producer(negative.inputs[0], "Slice") if negative is not None else None
    lower = producer(concat.inputs[1], "Slice")
    size = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(size, int) or upper is None or lower is None:
        return False
    half = size // 2
    return _is_slice(upper, x, half, size) and _is_slice(lower, x, 0, half)


def _is_slice(node: ir.Node, x: ir.Value, start: int, end: int) -> bool:
    """Whether it takes x[..., start:end]."""
    numbers = [number(value) for value in node.inputs[1:]]
    if node.inputs[0] is not x or None in numbers:
        return False
    first, last, axis, step = [*numbers, 1][:4]
    to_the_end = end == x.shape[3] and last > end  # type: ignore[index,operator]
    return first == start and (last == end or to_the_end) and axis in (3, -1) and step == 1


def _tokens_first(value: ir.Value | None, new: list[ir.Node]) -> ir.Value:
    """[B,H,S,D] as [B,S,H,D]: what was transposed into it, or a transpose that goes to `new`."""
    producer = value.producer() if value is not None else None
    if producer is not None and _is_transpose(producer):
        return producer.inputs[0]  # type: ignore[return-value]
    new.append(ir.node("Transpose", [value], attributes={"perm": TOKENS_FIRST}))
    return new[-1].outputs[0]


def _packed(rows: Sequence[ir.Value]) -> list[ir.Value | None] | None:
    """One value [B,S,N] in whose last axis query, key and value [B,S,H,D] follow each other; None if there is none."""
    reshapes = [producer(value, "Reshape") for value in rows]
    parts = [reshape.inputs[0] if reshape is not None else None for reshape in reshapes]
    split = producer(parts[0], "Split")
    if split is None or list(split.outputs) != parts or len(split.inputs[0].shape or ()) != 3:  # type: ignore[union-attr]
        return None
    return [split.inputs[0], None, None] if split.attributes["axis"].as_int() in (-1, 2) else None


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == TOKENS_FIRST


def _divide(graph: ir.Graph) -> None:
    """x * (1 / sqrt(v)) as x / sqrt(v): the form in which ONNX Runtime recognises a norm and makes one node of it."""
    for node in list(graph):
        for x, other in both_ways(node) if node.op_type == "Mul" else ():
            reciprocal = producer(other, "Reciprocal")
            if reciprocal is not None and producer(reciprocal.inputs[0], "Sqrt"):
                quotient = ir.node("Div", [x, reciprocal.inputs[0]])
                graph.insert_before(node, quotient)
                take_over(node.outputs[0], quotient.outputs[0])
                break
