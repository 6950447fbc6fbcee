"""The forms of RoPE that find_rope cannot follow: one function a form, which writes it anew in plain operators.

find_rope follows the data of the query alone, through operators that torch can evaluate and ONNX has. A kernel that
turns queries and keys at once, for example, is neither. A form need not be careful, since find_rope verifies by probing
what it left. docs/extending.md adds one.
"""

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from keysieve.passes.graph import Graph

Rewrite = Callable[[Graph, Node], None]
"""form(graph, node): replace the node's uses by plain operators; leave alone what is not as expected."""

FORMS: dict[Any, Rewrite] = {}
"""Operator -> its form."""


def rope_form(operator: Any) -> Callable[[Rewrite], Rewrite]:
    """Decorator: call the function at every node that calls this operator."""

    def register(form: Rewrite) -> Rewrite:
        FORMS[operator] = form
        return form

    return register


def lower_rope(graph: Graph) -> None:
    """Rewrite every node for whose operator there is a form, in place."""
    for node in [node for node in graph.fx.nodes if node.target in FORMS]:
        FORMS[node.target](graph, node)
    graph.fx.eliminate_dead_code()
