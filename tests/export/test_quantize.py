"""Integer weights: what is replaced, how close the product stays, and that ONNX Runtime computes what the file says."""

import logging
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from keysieve.export.quantize import quantize

DEPTH, WIDTH, COLUMNS = 64, 96, 40


def model(seed: int = 0) -> ir.Model:
    """x -> two products, of a transposed matrix and of one as it is -> logits; an embedding beside them."""
    rng = np.random.default_rng(seed)
    weights = {"first": (WIDTH, DEPTH), "head": (WIDTH, COLUMNS), "table": (10, DEPTH)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["first"], ["first_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "first_t"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "hidden_t"], ["square"]),
        helper.make_node("Transpose", ["hidden"], ["hidden_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["square", "hidden"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "head"], ["raw"]),
        helper.make_node("Tanh", ["raw"], ["logits"]),
    ]
    nodes[3:5] = [nodes[4], nodes[3]]
    graph = helper.make_graph(
        nodes,
        "two products",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(rng.normal(size=s).astype(np.float32) / 8, n) for n, s in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(10)})[0]


@pytest.mark.parametrize(("weights", "bits", "error"), [("int8", (8, 8), 0.01), ("int4", (4, 8), 0.1)])
def test_products_with_constants_become_integers(weights: str, bits: tuple[int, int], error: float) -> None:
    changed = model()
    before = run(changed)
    found = quantize(changed, weights)
    nodes = [node for node in changed.graph if node.op_type == "MatMulNBits"]
    assert [(n.attributes["K"].value, n.attributes["N"].value) for n in nodes] == [(DEPTH, WIDTH), (WIDTH, COLUMNS)]
    assert tuple(node.attributes["bits"].value for node in nodes) == bits  # the last product never has less than 8
    assert sum(node.op_type == "MatMul" for node in changed.graph) == 2  # of two activations
    assert (found.products, found.quantized) == (2, 2)
    (table,) = (node for node in changed.graph if node.op_type == "GatherBlockQuantized")
    assert table.attributes["bits"].value == 8
    assert found.bytes_before == 4 * (DEPTH * WIDTH + WIDTH * COLUMNS + 10 * DEPTH)
    assert found.bytes_after < found.bytes_before / (3 if weights == "int8" else 4)
    assert 0 < found.error < error
    after = run(changed)
    assert 0 < np.abs(after - before).mean() < 5 * error * np.abs(before).mean()
    assert {"first", "head", "table"}.isdisjoint(changed.graph.initializers)


def test_products_of_the_same_activations_become_one() -> None:
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=(columns, DEPTH)).astype(np.float32) for name, columns in (("a", 24), ("b", 40))}
    nodes = [
        *(helper.make_node("Transpose", [name], [f"{name}_t"], perm=[1, 0]) for name in weights),
        *(helper.make_node("MatMul", ["x", f"{name}_t"], [f"x{name}"]) for name in weights),
        helper.make_node("Concat", ["xb", "xa"], ["both"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, DEPTH])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("both", "xa")]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "one input", inputs, outputs, initializers)
    changed = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    assert quantize(changed, "int8").quantized == 2
    (product,) = (node for node in changed.graph if node.op_type == "MatMulNBits")
    assert product.attributes["N"].value == 64
    session = ort.InferenceSession(ir.to_proto(changed).SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.normal(size=(3, DEPTH)).astype(np.float32)
    both, first = session.run(None, {"x": x})
    wanted = np.concatenate([x @ weights["b"].T, x @ weights["a"].T], 1)
    np.testing.assert_allclose(both, wanted, atol=0.02 * np.abs(wanted).max())
    assert np.array_equal(first, both[:, 40:])


def test_a_tied_table_is_there_once() -> None:
    table = np.random.default_rng(2).normal(size=(10, DEPTH)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["table"], ["table_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "table_t"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [None])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "tied", inputs, outputs, [numpy_helper.from_array(table, "table")])
    changed = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    assert quantize(changed, "int4").bytes_before == table.nbytes
    product, lookup = (
        next(node for node in changed.graph if node.op_type == name) for name in ("MatMulNBits", "GatherBlockQuantized")
    )
    for one, other in zip(product.inputs[1:], (lookup.inputs[0], *lookup.inputs[2:]), strict=True):
        assert np.shares_memory(one.const_value.numpy(), other.const_value.numpy())
    wanted = table @ table.T
    np.testing.assert_allclose(run(changed), wanted, atol=0.02 * np.abs(wanted).max())


def test_a_table_that_does_not_fit_stays() -> None:
    """Rows that are no whole blocks, and columns that are looked up."""
    narrow, across = model(), model()
    narrow.graph.initializers["table"].const_value = ir.tensor(np.zeros((10, DEPTH - 8), np.float32))
    next(node for node in across.graph if node.op_type == "Gather").attributes["axis"] = ir.AttrInt64("axis", 1)
    for changed in (narrow, across):
        quantize(changed, "int8")
        assert "Gather" in {node.op_type for node in changed.graph} and "table" in changed.graph.initializers


def test_the_error_is_that_of_the_weights() -> None:
    """Weights that lie on a grid of 4 bits lose nothing."""
    exact = model()
    grid = np.tile(np.arange(16, dtype=np.float32) - 7, 2) / 8
    exact.graph.initializers["first"].const_value = ir.tensor(np.tile(grid, (WIDTH, DEPTH // 32)))
    for name, shape in (("head", (WIDTH, COLUMNS)), ("table", (10, DEPTH))):
        exact.graph.initializers[name].const_value = ir.tensor(np.zeros(shape, np.float32))
    assert quantize(exact, "int4").error < 1e-6


def test_half_precision_products_stay() -> None:
    half = model()
    for name in ("first", "head", "table"):
        value = half.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16))
    found = quantize(half, "int4")
    assert (found.products, found.quantized, found.error) == (2, 0, 0.0)


def test_other_loggers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer", raising=False)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    before = root.level
    quantize(model(), "int4")
    assert (root.handlers, root.level) == ([], before)
