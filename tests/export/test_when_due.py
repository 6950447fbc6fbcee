"""What moves behind the question whether a round is due: all that only centre and weight need, and nothing else."""

import onnx_ir as ir
import pytest

from keysieve.export.when_due import compute_when_due
from keysieve.plugins.contract import DOMAIN

FLOAT, INT32 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT32)


def graph_with(*, shared: bool = False, wanted: bool = False) -> ir.Graph:
    """centre = Neg(Sin(angle)) -> score. shared: another node reads the sine; wanted: it is an output too."""
    names = ("length", "limit", "position", "angle", "weight", "key")
    inputs = {name: ir.Value(name=name, shape=ir.Shape([1]), type=FLOAT) for name in names}
    for name in ("length", "limit"):
        inputs[name].type = INT32
    sine = ir.node("Sin", [inputs["angle"]])
    centre = ir.node("Neg", sine.outputs)
    other = ir.node("Abs", sine.outputs if shared else [inputs["angle"]])
    score = ir.node(
        "KeySieveScore",
        [*(inputs[name] for name in names[:3]), centre.outputs[0], inputs["weight"], inputs["key"]],
        domain=DOMAIN,
    )
    nodes = [sine, centre, other, score]
    for node, name in zip(nodes, ("sine", "centre", "other", "scores"), strict=True):
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, FLOAT, ir.Shape([1])
    outputs = [score.outputs[0], other.outputs[0], *(sine.outputs if wanted else ())]
    return ir.Graph(list(inputs.values()), outputs, nodes=nodes, opset_imports={"": 24, DOMAIN: 1}, name="graph")


@pytest.mark.parametrize(
    ("options", "moved"),
    [({}, {"Sin", "Neg"}), ({"shared": True}, {"Neg"}), ({"wanted": True}, {"Neg"})],
    ids=["free", "shared", "wanted"],  # a set's own text differs from worker to worker
)
def test_what_others_need_stays(options: dict[str, bool], moved: set[str]) -> None:
    graph = graph_with(**options)
    assert compute_when_due(graph) == len(moved)
    decide = next(node for node in graph if node.op_type == "If")
    due, idle = (decide.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    assert {node.op_type for node in due} == moved
    score = next(node for node in graph if node.op_type == "KeySieveScore")
    assert score.inputs[3] is decide.outputs[0] and score.inputs[4] in graph.inputs
    names = [output.name for node in [*graph, *due, *idle] for output in node.outputs]
    assert len(names) == len(set(names))


def test_without_a_score_nothing_moves() -> None:
    graph = graph_with()
    score = next(node for node in graph if node.op_type == "KeySieveScore")
    score.op_type = "Other"
    assert compute_when_due(graph) == 0 and len(list(graph)) == 4
