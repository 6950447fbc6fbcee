"""Integer products that are read in place: which change, what goes into them, and that they compute the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from keysieve.export.onnx import _save
from keysieve.export.quantize import quantize
from keysieve.export.read_in_place import read_in_place
from keysieve.plugins.contract import DOMAIN
from keysieve.plugins.onnxruntime.build import find_library

DEPTH, WIDTH, WORDS = 64, 96, 200

# The nodes between gate and up, and what the product behind them reads.
SILU = [("Sigmoid", ["gate"], "curve"), ("Mul", ["gate", "curve"], "silu"), ("Mul", ["silu", "up"], "hidden")]
SWAPPED = [("Sigmoid", ["gate"], "curve"), ("Mul", ["curve", "gate"], "silu"), ("Mul", ["up", "silu"], "hidden")]
OTHER_HALF = [("Sigmoid", ["up"], "curve"), ("Mul", ["up", "curve"], "silu"), ("Mul", ["silu", "gate"], "hidden")]
OTHER_CURVE = [("Tanh", ["gate"], "curve"), ("Mul", ["gate", "curve"], "silu"), ("Mul", ["silu", "up"], "hidden")]
OTHER_GATE = [("Sigmoid", ["up"], "curve"), ("Mul", ["gate", "curve"], "silu"), ("Mul", ["silu", "up"], "hidden")]


def model(folder: Path, between) -> ir.Model:
    """ids -> table -> gate and up -> `between` -> down -> logits by the table; int4, from disk."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, DEPTH), "g": (WIDTH, DEPTH), "u": (WIDTH, DEPTH), "d": (DEPTH, WIDTH)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"])]
    nodes += [helper.make_node("Transpose", [name], [f"{name}_t"], perm=[1, 0]) for name in ("g", "u", "d", "table")]
    nodes += [helper.make_node("MatMul", ["x", f"{name}_t"], [out]) for name, out in (("g", "gate"), ("u", "up"))]
    nodes += [helper.make_node(kind, names, [out]) for kind, names, out in between]
    nodes += [
        helper.make_node("MatMul", ["hidden", "d_t"], ["y"]),
        helper.make_node("MatMul", ["y", "table_t"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, None])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    weights = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32) / 4, n) for n, s in shapes.items()]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, WIDTH]) for name in ("gate", "up", "hidden")
    ]
    graph = helper.make_graph(nodes, "one layer", inputs, outputs, weights, value_info=values)
    made = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    quantize(made, "int4")
    _save(made, folder / "model.onnx")
    return ir.load(folder / "model.onnx")


def change(model: ir.Model) -> None:
    read_in_place(model.graph)
    RemoveUnusedNodesPass()(model)


def run(changed: ir.Model, folder: Path) -> np.ndarray:
    changed.opset_imports[DOMAIN] = 1
    ir.save(changed, folder / "changed.onnx")
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(find_library()))
    session = ort.InferenceSession(str(folder / "changed.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(WORDS)[None]})[0]


def operators(changed: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in changed.graph)


@pytest.mark.parametrize(
    ("between", "gated"),
    [
        (SILU, [0, 1, 0]),
        (SWAPPED, [0, 1, 0]),
        (OTHER_HALF, [0, 0, 0]),
        (OTHER_CURVE, [0, 0, 0]),
        (OTHER_GATE, [0, 0, 0]),
    ],
    ids=["silu", "swapped", "other half", "other curve", "other gate"],
)
def test_products_and_their_gates(between, gated: list[int], tmp_path: Path) -> None:
    changed = model(tmp_path, between)
    before = run(changed, tmp_path)
    assert operators(changed)["MatMulNBits"] == 3
    change(changed)
    products = [node for node in changed.graph if node.op_type == "KeySieveLinear"]
    assert [node.attributes["gated"].value for node in products] == gated
    assert [node.attributes["bits"].value for node in products] == [4, 4, 8]
    np.testing.assert_allclose(run(changed, tmp_path), before, atol=0.01 * np.abs(before).max())


def test_what_an_embedding_has_too_is_mapped_once(tmp_path: Path) -> None:
    changed = model(tmp_path, SILU)
    change(changed)
    lookup = next(node for node in changed.graph if node.op_type == "GatherBlockQuantized")
    *others, head = (node for node in changed.graph if node.op_type == "KeySieveLinear")
    data, _, scale, zero = lookup.inputs
    assert list(head.inputs[1:]) == [data, scale, zero]
    assert all(not {data, scale, zero} & set(node.inputs) for node in others)
