"""Products that read their weights in place: which change, what goes into them, and that they compute the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx_ir.passes.common import RemoveUnusedNodesPass

from keysieve.export.onnx import _save
from keysieve.export.quantize import quantize
from keysieve.export.read_in_place import read_in_place
from keysieve.plugins.contract import DOMAIN, LINEAR, MATMUL
from keysieve.plugins.onnxruntime.build import find_library

DEPTH, WIDTH, WORDS = 64, 96, 200

# The nodes between gate and up, and what the product behind them reads.
SILU = [("Sigmoid", ["gate"], "curve"), ("Mul", ["gate", "curve"], "silu"), ("Mul", ["silu", "up"], "hidden")]
SWAPPED = [("Sigmoid", ["gate"], "curve"), ("Mul", ["curve", "gate"], "silu"), ("Mul", ["up", "silu"], "hidden")]
OTHER_HALF = [("Sigmoid", ["up"], "curve"), ("Mul", ["up", "curve"], "silu"), ("Mul", ["silu", "gate"], "hidden")]
OTHER_CURVE = [("Tanh", ["gate"], "curve"), ("Mul", ["gate", "curve"], "silu"), ("Mul", ["silu", "up"], "hidden")]
OTHER_GATE = [("Sigmoid", ["up"], "curve"), ("Mul", ["gate", "curve"], "silu"), ("Mul", ["silu", "up"], "hidden")]


def model(folder: Path, between, weights: str | None = "int4") -> ir.Model:
    """ids -> table -> gate and up -> `between` -> down -> logits by the table, from disk."""
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
    constants = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32) / 4, n) for n, s in shapes.items()]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, WIDTH]) for name in ("gate", "up", "hidden")
    ]
    graph = helper.make_graph(nodes, "one layer", inputs, outputs, constants, value_info=values)
    made = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    if weights:
        quantize(made, weights)
    _save(made, folder / "model.onnx")
    return ir.load(folder / "model.onnx")


def change(model: ir.Model) -> None:
    read_in_place(model.graph)
    RemoveUnusedNodesPass()(model)


def run(changed: ir.Model, folder: Path, inputs: dict[str, np.ndarray] | None = None) -> np.ndarray:
    changed.opset_imports[DOMAIN] = 1
    ir.save(changed, folder / "changed.onnx")
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(find_library()))
    session = ort.InferenceSession(str(folder / "changed.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs or {"ids": np.arange(WORDS)[None]})[0]


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


def test_float_weights(tmp_path: Path) -> None:
    changed = model(tmp_path, SILU, None)
    before = run(changed, tmp_path)
    change(changed)
    assert (operators(changed)["KeySieveMatMul"], operators(changed)["MatMul"], operators(changed)["Transpose"]) == (
        4,
        0,
        0,
    )
    lookup = next(node for node in changed.graph if node.op_type == "Gather")
    *_, head = (node for node in changed.graph if node.op_type == "KeySieveMatMul")
    assert head.inputs[1] is lookup.inputs[0]
    np.testing.assert_allclose(run(changed, tmp_path), before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_other_products_stay() -> None:
    """Of two activations, of a constant that is not transposed, and of half precision."""
    half = numpy_helper.from_array(np.zeros((4, 8), np.float16), "half")
    nodes = [
        helper.make_node("Transpose", ["x"], ["x_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "x_t"], ["square"]),
        helper.make_node("MatMul", ["x", "plain"], ["y"]),
        helper.make_node("Cast", ["x"], ["x_half"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["half"], ["half_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x_half", "half_t"], ["z"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 8])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("square", "y")]
    outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT16, None))
    plain = numpy_helper.from_array(np.zeros((8, 4), np.float32), "plain")
    graph = helper.make_graph(nodes, "others", inputs, outputs, [plain, half])
    changed = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    change(changed)
    assert operators(changed)["MatMul"] == 3


# An RMS norm of x with the weights n, in forms that exporters write.
NORM = [
    ("Pow", ["x", "two"], "squares"),
    ("ReduceMean", ["squares", "last"], "mean"),
    ("Add", ["mean", "epsilon"], "raised"),
    ("Sqrt", ["raised"], "root"),
    ("Div", ["x", "root"], "normal"),
    ("Mul", ["n", "normal"], "ready"),
]


def replaced(name: str, *by: tuple[str, list[str], str]) -> list[tuple[str, list[str], str]]:
    """NORM with other nodes in place of the one that makes `name`."""
    place = [out for _, _, out in NORM].index(name)
    return [*NORM[:place], *by, *NORM[place + 1 :]]


RELU = [("Relu", ["x"], "ready")]
ADD = [("Add", ["product", "x"], "y")]


def product(folder: Path, before, behind, weights: str | None) -> ir.Model:
    """x -> `before` -> ready -> product -> `behind` -> y."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(DEPTH, DEPTH)).astype(np.float32) / 8,
        "n": rng.uniform(0.5, 2, DEPTH).astype(np.float32),
        "table": rng.normal(size=(1, 1, DEPTH)).astype(np.float32),
        "one": np.float32(1),
        "two": np.float32(2),
        "four": np.float32(4),
        "epsilon": np.float32(0.01),
        "last": np.array([-1]),
        "first": np.array([1]),
        "heads": np.array([0, 0, 4, 16]),
        "joined": np.array([0, 0, DEPTH]),
    }
    nodes = [*before, ("MatMul", ["ready", "w_t"], "product"), *behind]
    made = [helper.make_node("Transpose", ["w"], ["w_t"], perm=[1, 0])]
    made += [helper.make_node(kind, names, [out]) for kind, names, out in nodes]
    shape = [1, "tokens", DEPTH]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(made, "a product", [x], [y], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    given = ir.from_proto(shape_inference.infer_shapes(proto))
    if weights:
        quantize(given, weights)
    _save(given, folder / "model.onnx")
    return ir.load(folder / "model.onnx")


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize(
    ("before", "behind", "taken"),
    [
        (NORM, ADD, {"norm", "residual"}),
        (replaced("squares", ("Mul", ["x", "x"], "squares")), ADD, {"norm", "residual"}),
        (replaced("ready", ("Mul", ["normal", "n"], "ready")), [("Add", ["x", "product"], "y")], {"norm", "residual"}),
        (replaced("raised", ("Add", ["epsilon", "mean"], "raised")), [("Identity", ["product"], "y")], {"norm"}),
        (replaced("squares", ("Pow", ["x", "four"], "squares")), ADD, {"residual"}),
        (replaced("mean", ("ReduceMean", ["squares", "first"], "mean")), ADD, {"residual"}),
        (replaced("mean", ("ReduceSum", ["squares", "last"], "mean")), ADD, {"residual"}),
        (replaced("normal", ("Div", ["squares", "root"], "normal")), ADD, {"residual"}),
        (replaced("ready", ("Mul", ["one", "normal"], "ready")), ADD, {"residual"}),
        (NORM, [("Add", ["product", "table"], "y")], {"norm"}),
        (NORM, [("Add", ["product", "x"], "sum"), ("Mul", ["product", "sum"], "y")], {"norm"}),
        (NORM, [("Add", ["product", "product"], "y")], {"norm"}),
        (RELU, [("Sub", ["product", "x"], "y")], set()),
    ],
    ids=[
        "norm",
        "square as product",
        "swapped",
        "no residual",
        "fourth powers",
        "mean over tokens",
        "sum of squares",
        "of another value",
        "one number as weights",
        "a row for all tokens",
        "read twice",
        "twice itself",
        "difference",
    ],
)
def test_what_stands_around_a_product(before, behind, taken: set[str], weights: str | None, tmp_path: Path) -> None:
    changed = product(tmp_path, before, behind, weights)
    x = {"x": np.random.default_rng(1).normal(size=(1, 5, DEPTH)).astype(np.float32)}
    wanted = run(changed, tmp_path, x)
    change(changed)
    (node,) = (node for node in changed.graph if node.op_type in (LINEAR.name, MATMUL.name))
    ports = (LINEAR if weights else MATMUL).inputs
    found = {port.name for port, value in zip(ports, node.inputs, strict=False) if value is not None}
    assert found & {"norm", "residual"} == taken
    assert (operators(changed)["Sqrt"] == 0) == ("norm" in taken or before == RELU)
    tolerance = 0.02 if weights else 1e-5
    np.testing.assert_allclose(run(changed, tmp_path, x), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("weights", [None, "int4"])
def test_heads_are_joined_by_the_product(weights: str | None, tmp_path: Path) -> None:
    join = [("Reshape", ["x", "heads"], "apart"), ("Relu", ["apart"], "some"), ("Reshape", ["some", "joined"], "ready")]
    changed = product(tmp_path, join, ADD, weights)
    x = {"x": np.random.default_rng(1).normal(size=(1, 5, DEPTH)).astype(np.float32)}
    wanted = run(changed, tmp_path, x)
    change(changed)
    assert operators(changed)["Reshape"] == 1
    tolerance = 0.02 if weights else 1e-5
    np.testing.assert_allclose(run(changed, tmp_path, x), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
