"""read_in_place: products with integer weights that are read where the file is mapped.

    x, W as integers -> MatMulNBits
becomes
    x, W as integers -> KeySieveLinear
and where gate and up are one product,
    both -> Split -> silu(gate) * up -> MatMulNBits
becomes
    both -> KeySieveLinear, which does this while it rounds what it reads
"""

import onnx_ir as ir

from keysieve.export.quantize import integer_products
from keysieve.export.rewriting import both_ways, producer, take_over
from keysieve.plugins.contract import DOMAIN, LINEAR, NAMESPACE


def read_in_place(graph: ir.Graph) -> None:
    """Put KeySieveLinear in place of every MatMulNBits, which packs a copy of its weights.

    Integers that an embedding has too become the embedding's own, so that they are mapped once.
    """
    products = integer_products(graph)
    used = {value for product in products for value in product.inputs}
    others = {_place(value): value for value in graph.initializers.values() if value not in used}
    for product in products:
        x, *integers = product.inputs
        integers = [others.get(_place(value), value) if _place(value) else value for value in integers]
        both = _gate_and_up(x)
        attributes: dict[str, int | str] = {name: product.attributes[name].as_int() for name in ("N", "K", "bits")}
        attributes |= {"gated": int(both is not None), "plugin_version": LINEAR.version, "plugin_namespace": NAMESPACE}
        linear = ir.node(LINEAR.name, [both or x, *integers], attributes, domain=DOMAIN, name=product.name)
        graph.insert_before(product, linear)
        take_over(product.outputs[0], linear.outputs[0])


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
