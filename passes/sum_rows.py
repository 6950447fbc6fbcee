"""sum_rows: the product of one row with a matrix that has a row for each token becomes a sum.

    row [...,1,S] @ matrix [...,S,N]   becomes   (row as a column * matrix).sum(-2)

For the torch engine: while decoding S is 1, and a GPU multiplies thousands of such pairs slower than anything else of a
step, where a multiplication and a sum are two launches, or none once they are fused.
"""

import torch

from keysieve.passes.graph import Graph

aten = torch.ops.aten


def sum_rows(graph: Graph) -> None:
    """Rewrite the products whose inner size differs from step to step."""
    for node in graph.calls(aten.matmul.default):
        row, matrix = node.args
        shape = graph.shape(row)  # type: ignore[arg-type]
        if len(shape) < 3 or shape[-2] != 1 or isinstance(shape[-1], int):
            continue
        with graph.before(node):
            column = graph.call(aten.transpose.int, row, -2, -1)
            scaled = graph.call(aten.mul.Tensor, column, matrix)
            node.replace_all_uses_with(graph.call(aten.sum.dim_IntList, scaled, [-2], True))
        graph.fx.erase_node(node)
