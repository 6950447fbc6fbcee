"""take_over: what the rewriting exports share, to put one value of an ONNX graph in the place of another."""

import onnx_ir as ir


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give `new` the name, shape, type and uses of `old`, which nothing uses then; its node goes with unused ones."""
    name, old.name = old.name, None
    new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
