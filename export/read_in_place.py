"""read_in_place: products whose weights are read where the file is mapped.

    x, W -> Transpose -> MatMul
becomes
    x, W -> KeySieveMatMul
and
    x, W as integers -> MatMulNBits
becomes
    x, W as integers -> KeySieveLinear
where gate and up are one product,
    both -> Split -> silu(gate) * up -> MatMulNBits
becomes
    both -> KeySieveLinear, which does this while it rounds what it reads
"""

from collections.abc import Sequence

import onnx_ir as ir

from keysieve.export.quantize import constant_matrix, integer_products
from keysieve.export.rewriting import both_ways, producer, take_over
from keysieve.plugins.contract import DOMAIN, LINEAR, MATMUL, NAMESPACE, PluginNode


def read_in_place(graph: ir.Graph) -> None:
    """Put KeySieveLinear and KeySieveMatMul in place of MatMulNBits and MatMul, which pack a copy of their weights.

    Integers that an embedding has too become the embedding's own, so that they are mapped once.
    """
    _read_integers(graph)
    for product in [node for node in graph if node.op_type == "MatMul"]:
        matrix = constant_matrix(product.inputs[1])
        if matrix is not None and matrix.transposed and matrix.tensor.dtype == ir.DataType.FLOAT:
            _replace(graph, product, MATMUL, [product.inputs[0], graph.initializers[matrix.name]], {})


def _read_integers(graph: ir.Graph) -> None:
    products = integer_products(graph)
    used = {value for product in products for value in product.inputs}
    others = {_place(value): value for value in graph.initializers.values() if value not in used}
    for product in products:
        x, *integers = product.inputs
        integers = [others.get(_place(value), value) if _place(value) else value for value in integers]
        both = _gate_and_up(x)
        attributes = {name: product.attributes[name].as_int() for name in ("N", "K", "bits")}
        _replace(graph, product, LINEAR, [both or x, *integers], {**attributes, "gated": int(both is not None)})


def _replace(
    graph: ir.Graph, product: ir.Node, by: PluginNode, inputs: Sequence[ir.Value | None], attributes: dict[str, int]
) -> None:
    versions = {"plugin_version": by.version, "plugin_namespace": NAMESPACE}
    node = ir.node(by.name, inputs, {**attributes, **versions}, domain=DOMAIN, name=product.name)
    graph.insert_before(product, node)
    take_over(product.outputs[0], node.outputs[0])


def _gate_and_up(x: ir.Value | None) -> ir.Value | None:
    """The value whose halves along the last axis are gate and up, where x is silu(gate) * up; else None."""
    for silu, up in both_ways(producer(x, "Mul")):
        for gate, sigmoid in both_ways(producer(silu, "Mul")):
            curve, split = producer(sigmoid, "Sigmoid"), producer(up, "Split")
            if curve is None or split is None or curve.inputs[0] is not gate or list(split.outputs) != [gate, up]:
                continue
            last = len(gate.shape) - 1 if gate.shape is not None else None
            if gate.shape == up.shape and split.attributes["axis"].as_int() in (-1, last):
                return split.inputs[0]
    return None


def _place(value: ir.Value | None) -> tuple[int | None, int | None] | None:
    """Where the numbers of an initializer begin in the data file, and how many bytes they have; None if elsewhere."""
    tensor = value.const_value if value is not None else None
    return (tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else None
