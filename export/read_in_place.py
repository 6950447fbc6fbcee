"""read_in_place: products whose weights are read where the file is mapped.

    x, W -> Transpose -> MatMul
becomes
    x, W -> KeySieveMatMul
and
    x, W as integers -> MatMulNBits
becomes
    x, W as integers -> KeySieveLinear
They take along what stands around them: an RMS norm of x and the reshape of heads in front, the sum with the residual
behind; and where gate and up are one product,
    both -> Split -> silu(gate) * up -> MatMulNBits
becomes
    both -> KeySieveLinear
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from keysieve.export.quantize import constant_matrix, integer_products
from keysieve.export.rewriting import both_ways, number, producer, take_over
from keysieve.plugins.contract import DOMAIN, LINEAR, MATMUL, NAMESPACE, PluginNode


def read_in_place(graph: ir.Graph) -> None:
    """Put KeySieveLinear and KeySieveMatMul in place of MatMulNBits and MatMul, which pack a copy of their weights.

    Integers that an embedding has too become the embedding's own, so that they are mapped once.
    """
    _read_integers(graph)
    for product in [node for node in graph if node.op_type == "MatMul"]:
        matrix = constant_matrix(product.inputs[1])
        if matrix is not None and matrix.transposed and matrix.tensor.dtype == ir.DataType.FLOAT:
            x, norm, epsilon = _normalised(product.inputs[0], matrix.shape[0])
            _replace(graph, product, MATMUL, [x, graph.initializers[matrix.name], norm], {"epsilon": epsilon})


def _read_integers(graph: ir.Graph) -> None:
    products = integer_products(graph)
    used = {value for product in products for value in product.inputs}
    others = {_place(value): value for value in graph.initializers.values() if value not in used}
    for product in products:
        x, *integers = product.inputs
        integers = [others.get(_place(value), value) if _place(value) else value for value in integers]
        attributes: dict[str, Any] = {name: product.attributes[name].as_int() for name in ("N", "K", "bits")}
        both = _gate_and_up(x)
        x, norm, epsilon = (both, None, 0.0) if both else _normalised(x, attributes["K"])
        attributes |= {"gated": int(both is not None), "epsilon": epsilon}
        _replace(graph, product, LINEAR, [x, *integers, norm], attributes)


def _replace(
    graph: ir.Graph, product: ir.Node, by: PluginNode, inputs: Sequence[ir.Value | None], attributes: dict[str, Any]
) -> None:
    attributes |= {"plugin_version": by.version, "plugin_namespace": NAMESPACE}
    total, residual = _added(product.outputs[0])
    node = ir.node(by.name, [*inputs, residual], attributes, domain=DOMAIN, name=product.name)
    graph.insert_before(total or product, node)
    take_over((total or product).outputs[0], node.outputs[0])


def _added(y: ir.Value) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The sum that alone reads y, and what of the same shape it adds; None where there is no such."""
    uses = list(y.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not y.is_graph_output():
        other = uses[0].node.inputs[1 - uses[0].idx]
        if other is not None and y.shape is not None and other.shape == y.shape and not y.shape.has_unknown_dim():
            return uses[0].node, other
    return None, None


def _normalised(x: ir.Value | None, depth: int) -> tuple[ir.Value | None, ir.Value | None, float]:
    """What of x a product over `depth` needs to read: x / sqrt(mean of squares + epsilon) * norm of it is x.

    Else norm is None, and where x only joins the heads of another value, that is read.
    """
    for norm, quotient in both_ways(producer(x, "Mul")):
        divide = producer(quotient, "Div")
        if divide is None or _sizes(norm) != [depth]:
            continue
        whole, root = divide.inputs[0], producer(divide.inputs[1], "Sqrt")
        for mean, constant in both_ways(producer(root.inputs[0], "Add")) if root is not None else ():
            epsilon = number(constant)
            if epsilon is not None and _is_mean_of_squares(mean, whole):
                return whole, norm, epsilon
    reshape = producer(x, "Reshape")
    if reshape is not None and _joins_heads(_sizes(reshape.inputs[0]), _sizes(x), depth):
        x = reshape.inputs[0]
    return x, None, 0.0


def _is_mean_of_squares(mean: ir.Value, x: ir.Value | None) -> bool:
    """Whether it is mean(x * x) along the last axis, which it keeps."""
    reduce = producer(mean, "ReduceMean")
    sizes = _sizes(x)
    if reduce is None or sizes is None or reduce.attributes.get_int("keepdims", 1) != 1 or len(reduce.inputs) != 2:
        return False
    power, product = producer(reduce.inputs[0], "Pow"), producer(reduce.inputs[0], "Mul")
    squared = power is not None and power.inputs[0] is x and number(power.inputs[1]) == 2
    squared = squared or (product is not None and product.inputs[0] is product.inputs[1] is x)
    return squared and number(reduce.inputs[1]) in (-1, len(sizes) - 1)


def _joins_heads(before: list[Any] | None, after: list[Any] | None, depth: int) -> bool:
    """Whether it is a reshape [B,S,H,D] -> [B,S,depth]."""
    if before is None or len(before) != 4 or None in before or after != [*before[:2], depth]:
        return False
    heads, dim = before[2:]
    return isinstance(heads, int) and isinstance(dim, int) and heads * dim == depth


def _sizes(value: ir.Value | None) -> list[Any] | None:
    """Numbers and names of a shape's axes, None for an axis that has neither; None for no shape."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


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
