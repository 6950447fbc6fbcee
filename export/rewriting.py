"""rewriting: what the exports share that put values of an ONNX graph in the place of others."""

import onnx_ir as ir


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give `new` the name, shape, type and uses of `old`, which nothing uses then; its node goes with unused ones."""
    name, old.name = old.name, None
    new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes the value, where it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def both_ways(product: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    """The two operands of a node that does not mind their order; none where there is no node."""
    return [] if product is None else [tuple(product.inputs), tuple(reversed(product.inputs))]  # type: ignore[list-item]
