"""The forms in which models write attention themselves: one function a form, which says what it reads.

A form is tried at every node of the operators that it is registered for, and need not be careful: lower_attention
evaluates the subgraph and rewrites it only if it is the attention that the form says it is. docs/extending.md adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph

aten = torch.ops.aten
PASS_THROUGH = {aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.clone.default}


@dataclass(frozen=True)
class Anchor:
    """One attention as written: its result [B,Hq,S,Dv], and the inputs of it.

    query [B,Hq,S,D]; key and value [B,H,S,D], where H is Hkv or, repeated, Hq; mask [..,S,S], true where a token is
    seen or added to the logits; causal: without a mask, that the operator is causal; scale of the logits.
    """

    result: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    scale: float


AttentionForm = Callable[[Graph, Node], Anchor | None]
"""form(graph, node): the attention around a node, or None where it is not written in this form."""

FORMS: dict[Any, list[AttentionForm]] = {}
"""Operator -> the forms that are tried where it occurs, in order."""


def attention_form(*operators: Any) -> Callable[[AttentionForm], AttentionForm]:
    """Decorator: try the function at every node that calls one of these operators."""

    def register(form: AttentionForm) -> AttentionForm:
        for operator in operators:
            FORMS.setdefault(operator, []).append(form)
        return form

    return register


def read_attentions(graph: Graph) -> list[tuple[Node, Anchor | None]]:
    """Every node of a registered operator with what the first form reads there, in graph order.

    None where no form does; such a node is left out unless its result has four axes: a router's softmax has fewer.
    """
    found = []
    for node in graph.fx.nodes:
        forms = FORMS.get(node.target, [])
        anchor = next(filter(None, (form(graph, node) for form in forms)), None)
        if anchor or (forms and len(graph.shape(node)) == 4):
            found.append((node, anchor))
    return found


@attention_form(aten.scaled_dot_product_attention.default)
def fused(graph: Graph, node: Node) -> Anchor:
    """torch's own operator: q, k, v, mask or is_causal."""
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments.update(node.kwargs)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    scale = arguments.get("scale")
    if not isinstance(scale, float):
        scale = float(graph.shape(query)[-1]) ** -0.5  # type: ignore[arg-type]
    mask = arguments.get("attn_mask")
    return Anchor(node, query, key, value, mask, bool(arguments.get("is_causal")), scale)  # type: ignore[arg-type]


@attention_form(aten.softmax.int, aten._softmax.default)
def matmul_softmax_matmul(graph: Graph, softmax: Node) -> Anchor | None:
    """q @ k.T * scale + mask -> softmax -> dropout -> @ v."""
    result = softmax
    while result.target is not aten.matmul.default:
        if len(result.users) != 1 or (result is not softmax and result.target not in PASS_THROUGH):
            return None
        result = next(iter(result.users))
    node, scale, mask = softmax.args[0], 1.0, None
    while isinstance(node, Node) and node.target is not aten.matmul.default:
        first, second = (*node.args, None)[:2]
        if node.target is aten.add.Tensor and mask is None and isinstance(second, Node):
            mask = second
        elif node.target is aten.mul.Tensor and isinstance(second, (int, float)):
            scale *= second
        elif node.target is aten.div.Tensor and isinstance(second, (int, float)):
            scale /= second
        elif node.target not in PASS_THROUGH:
            return None
        node = first
    if not isinstance(node, Node):
        return None
    query, transposed = node.args
    if not isinstance(transposed, Node) or transposed.target is not aten.transpose.int:
        return None
    if sorted(axis % 4 for axis in transposed.args[1:]) != [2, 3]:  # type: ignore[operator]
        return None
    key, value = transposed.args[0], result.args[1]
    return Anchor(result, query, key, value, mask, False, scale)  # type: ignore[arg-type]
