"""when_due: what only a round needs, behind the question whether one is due.

    centre, weight (turned to the next position) -> KeySieveScore
becomes
    any(length >= limit) -> If(turn centre and weight, else nothing) -> KeySieveScore

KeySieveScore looks at neither where no sequence is due, so a step without a round is spared some fifty small nodes.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from keysieve.plugins.contract import SCORE

LENGTH, LIMIT, CENTRE, WEIGHT = (
    [port.name for port in SCORE.inputs].index(name) for name in ("length", "limit", "centre", "weight")
)


def compute_when_due(graph: ir.Graph) -> int:
    """Move the nodes that only the centres and weights of scores need into an If; returns how many these are."""
    scores = [node for node in graph if node.op_type == SCORE.name]
    moved = only_for(graph, [(score, place) for score in scores for place in (CENTRE, WEIGHT)])
    used = [score.inputs[place] for score in scores for place in (CENTRE, WEIGHT)]
    given = dict.fromkeys(value for value in used if value is not None and value.producer() in moved)
    if not given:
        return 0
    condition = _any_due(scores)
    order = [node for node in graph if node in moved]
    graph.remove(order)
    nothing = [_nothing(value) for value in given]
    for value, node in zip(given, nothing, strict=True):
        node.outputs[0].name = f"{value.name}_not_due"  # no name may stand in two graphs, one in the other
    decide = ir.node(
        "If",
        [condition[-1].outputs[0]],
        attributes={
            "then_branch": ir.Graph([], list(given), nodes=order, name="due"),
            "else_branch": ir.Graph([], [node.outputs[0] for node in nothing], nodes=nothing, name="not_due"),
        },
        num_outputs=len(given),
    )
    for value, output in zip(given, decide.outputs, strict=True):
        name = value.name
        output.name, output.type, value.name = name, value.type, f"{name}_due"
        for score in scores:
            for place in (CENTRE, WEIGHT):
                if score.inputs[place] is value:
                    score.replace_input_with(place, output)
    graph.insert_before(scores[0], [*condition, decide])
    return len(order)


def only_for(
    graph: ir.Graph, inputs: Sequence[tuple[ir.Node, int]] = (), outputs: Sequence[ir.Value] = ()
) -> set[ir.Node]:
    """The nodes whose results go nowhere but, at last, to these inputs of nodes and outputs of the graph.

    Nodes inside of a found one are among them.
    """
    found: set[ir.Node] = set()
    for node in reversed(graph):
        uses = [use for output in node.outputs for use in output.uses()]
        leaving = [output for output in node.outputs if output.is_graph_output()]
        only = all(use.node in found or (use.node, use.idx) in inputs for use in uses)
        if (uses or leaving) and only and all(output in outputs for output in leaving):
            branches = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
            found |= {node, *(inside for branch in branches for inside in branch)}
    return found


def _any_due(scores: Sequence[ir.Node]) -> list[ir.Node]:
    """Nodes, the last of which tells whether any sequence is due in any of the scores, which may be of classes."""
    pairs = dict.fromkeys((score.inputs[LENGTH], score.inputs[LIMIT]) for score in scores)
    over = [ir.node("Sub", pair) for pair in pairs]
    most = [ir.node("ReduceMax", node.outputs, attributes={"keepdims": 0}) for node in over]
    nodes = [*over, *most]
    if len(most) > 1:
        nodes.append(ir.node("Max", [node.outputs[0] for node in most]))
    zero = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(0, np.int32))})
    return [*nodes, zero, ir.node("GreaterOrEqual", [nodes[-1].outputs[0], zero.outputs[0]])]


def _nothing(value: ir.Value) -> ir.Node:
    """An empty tensor of the value's type and rank."""
    kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    empty = np.zeros([0] * len(value.shape or ()), kind)
    return ir.node("Constant", [], attributes={"value": ir.tensor(empty)})
