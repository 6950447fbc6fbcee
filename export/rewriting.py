"""rewriting: what the exports share that put values of an ONNX graph in the place of others."""

import onnx_ir as ir

SAME_NUMBER = ("Cast", "Reshape", "Unsqueeze", "Identity")  # of what they read, where that is one element


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give `new` the name, shape, type and uses of `old`, which nothing uses then; its node goes with unused ones."""
    name, old.name = old.name, None
    new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes the value, where it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def number(value: ir.Value | None) -> float | None:
    """A constant of one element, also where it comes through casts and reshapes."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is not None:
        return tensor.numpy().item() if tensor.size == 1 else None
    node = value.producer() if value is not None else None
    return number(node.inputs[0]) if node is not None and node.op_type in SAME_NUMBER else None


def both_ways(product: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    """The two operands of a node that does not mind their order; none where there is no node."""
    return [] if product is None else [tuple(product.inputs), tuple(reversed(product.inputs))]  # type: ignore[list-item]
