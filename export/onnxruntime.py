"""export for ONNX Runtime: the graph of model.onnx in the operators that run fastest there, on the same weights.

    query, key, value -> RoPE -> KeySieveUpdate -> Attention
becomes
    query, key, value, cos, sin -> KeySieveAttend

which the custom-op library of keysieve.plugins.onnxruntime brings: one node a layer instead of some thirty, no copy of
a cache, and work for the rows held instead of for the capacity. What does not have this form stays as it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from keysieve.passes.mask_span import Span
from keysieve.plugins.contract import ATTEND, DOMAIN, NAMESPACE, UPDATE

TOKENS_FIRST = (0, 2, 1, 3)  # [B,H,S,D] <-> [B,S,H,D]


def export_for_onnxruntime(model: Path, output: Path, windows: Mapping[int, Span]) -> int:
    """Write the graph of `model` for ONNX Runtime with the library to `output`, beside it: they share their weights.

    windows: what the layers see that have a window, by number; the others evict, and see all rows held.
    Returns the number of layers whose attention is one node now.
    """
    graph_model = ir.load(model)
    graph = graph_model.graph
    fused = 0
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type == UPDATE.name]:
        layer = int((node.inputs[5].name or "").removeprefix("key_"))  # type: ignore[union-attr]
        span = windows.get(layer, Span())
        if not span.chunk:
            fused += _fuse_attention(graph, node, span.window)
    for node in graph:
        node.overload = ""  # the library's ops serve every shape
    _divide(graph)
    common.RemoveUnusedNodesPass()(graph_model)
    common.RemoveUnusedFunctionsPass()(graph_model)
    graph_model.functions.clear()
    ir.save(graph_model, output)
    return fused


def _fuse_attention(graph: ir.Graph, update: ir.Node, window: int) -> bool:
    """Put KeySieveAttend in place of the update, the attention behind it, and RoPE where it has the half-split form."""
    key_out, value_out = update.outputs
    attention = _attention_of(key_out, value_out)
    if attention is None:
        return False
    query, (*new_rows, length, plan, keep, key, value) = attention.inputs[0], update.inputs
    # Where the caches are of another type, the op itself rounds the new rows.
    key_new, value_new = (cast.inputs[0] if (cast := _producer(row, "Cast")) else row for row in new_rows)
    query_rope, key_rope = _half_split(query), _half_split(key_new)
    cos = sin = None
    if query_rope and key_rope and query_rope[1:] == key_rope[1:]:
        (query, cos, sin), (key_new, _, _) = query_rope, key_rope
    new: list[ir.Node] = []
    tokens_first = [_tokens_first(value, new) for value in (query, key_new, value_new)]
    attributes: dict[str, int | float | str] = {
        "layer": update.attributes["layer"].as_int(),
        "scale": attention.attributes["scale"].as_float(),
        "softcap": 0.0,
        "window": window,
        "plugin_version": ATTEND.version,
        "plugin_namespace": NAMESPACE,
    }
    inputs = [*tokens_first, length, plan, keep, key, value, cos, sin]
    attend = ir.node(ATTEND.name, inputs, attributes, domain=DOMAIN, num_outputs=3, name=attention.name)
    read, *caches = attend.outputs
    for cache, old in zip(caches, (key_out, value_out), strict=True):
        cache.shape, cache.type = old.shape, old.type
    result = attention.outputs[0]
    read.type = result.type
    uses = list(result.uses())
    if len(uses) == 1 and _is_transpose(uses[0].node):
        old_read, old_nodes = uses[0].node.outputs[0], [update, attention, uses[0].node]
        new_nodes, new_read = [*new, attend], read
    else:
        back = ir.node("Transpose", [read], attributes={"perm": TOKENS_FIRST})
        old_read, old_nodes = result, [update, attention]
        new_nodes, new_read = [*new, attend, back], back.outputs[0]
    names = [key_out.name, value_out.name]
    ir.convenience.replace_nodes_and_values(
        graph, attention, old_nodes, new_nodes, [key_out, value_out, old_read], [*caches, new_read]
    )
    for cache, name in zip(caches, names, strict=True):
        cache.name = name
    return True


def _attention_of(key: ir.Value, value: ir.Value) -> ir.Node | None:
    """The one Attention that reads both caches, cast or not."""
    for use in _through_casts(key):
        node = use.node
        if node.op_type == "Attention" and any(
            other.node is node and other.idx == 2 for other in _through_casts(value)
        ):
            return node
    return None


def _through_casts(value: ir.Value) -> list[Any]:
    found: list[Any] = []
    for use in value.uses():
        found += _through_casts(use.node.outputs[0]) if use.node.op_type == "Cast" else [use]
    return found


def _half_split(rotated: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, cos and sin [B,S,D] of x * cos + concat(-x[half:], x[:half]) * sin; None for any other form."""
    total = _producer(rotated, "Add")
    for first, second in ((0, 1), (1, 0)) if total else ():
        plain, turned = (_producer(total.inputs[i], "Mul") for i in (first, second))  # type: ignore[union-attr]
        for x, cos in _both_ways(plain):
            for swapped, sin in _both_ways(turned):
                tables = [_producer(table, "Unsqueeze") for table in (cos, sin)]
                if all(tables) and _swapped_halves(swapped, x):
                    cosine, sine = (table.inputs[0] for table in tables)  # type: ignore[union-attr]
                    if len(cosine.shape or ()) == len(sine.shape or ()) == 3:  # type: ignore[union-attr]
                        return x, cosine, sine  # type: ignore[return-value]
    return None


def _both_ways(product: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    return [] if product is None else [tuple(product.inputs), tuple(reversed(product.inputs))]  # type: ignore[list-item]


def _swapped_halves(value: ir.Value, x: ir.Value) -> bool:
    """Whether value is concat(-x[half:], x[:half]) along the last of four axes."""
    concat = _producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in (-1, 3):
        return False
    negative = _producer(concat.inputs[0], "Neg")
    upper = _producer(negative.inputs[0], "Slice") if negative is not None else None
    lower = _producer(concat.inputs[1], "Slice")
    size = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(size, int) or upper is None or lower is None:
        return False
    half = size // 2
    return _is_slice(upper, x, half, size) and _is_slice(lower, x, 0, half)


def _is_slice(node: ir.Node, x: ir.Value, start: int, end: int) -> bool:
    """Whether it takes x[..., start:end]."""
    numbers = [_number(value) for value in node.inputs[1:]]
    if node.inputs[0] is not x or None in numbers:
        return False
    first, last, axis, step = [*numbers, 1][:4]
    to_the_end = end == x.shape[3] and last > end  # type: ignore[index,operator]
    return first == start and (last == end or to_the_end) and axis in (3, -1) and step == 1


def _number(value: ir.Value | None) -> int | None:
    """A constant of one element, also where it comes through casts and reshapes."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        producer = value.producer()
        if producer is not None and producer.op_type in ("Cast", "Reshape", "Unsqueeze", "Identity"):
            return _number(producer.inputs[0])
        return None
    return int(tensor.numpy().reshape(-1)[0]) if tensor.size == 1 else None


def _tokens_first(value: ir.Value | None, new: list[ir.Node]) -> ir.Value:
    """[B,H,S,D] as [B,S,H,D]: what was transposed into it, or a transpose that goes to `new`."""
    producer = value.producer() if value is not None else None
    if producer is not None and _is_transpose(producer):
        return producer.inputs[0]  # type: ignore[return-value]
    new.append(ir.node("Transpose", [value], attributes={"perm": TOKENS_FIRST}))
    return new[-1].outputs[0]


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == TOKENS_FIRST


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _divide(graph: ir.Graph) -> None:
    """x * (1 / sqrt(v)) as x / sqrt(v): the form in which ONNX Runtime recognises a norm and makes one node of it."""
    for node in list(graph):
        for x, other in _both_ways(node) if node.op_type == "Mul" else ():
            reciprocal = _producer(other, "Reciprocal")
            if reciprocal is not None and _producer(reciprocal.inputs[0], "Sqrt"):
                quotient = ir.node("Div", [x, reciprocal.inputs[0]])
                result, value = quotient.outputs[0], node.outputs[0]
                result.shape, result.type, name = value.shape, value.type, value.name
                ir.convenience.replace_nodes_and_values(graph, node, [node], [quotient], [value], [result])
                result.name = name
                break
