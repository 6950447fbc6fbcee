"""sum_rows: only the product of a single row with as many rows as a step has tokens becomes a sum."""

import torch
from torch import nn

from keysieve.passes.sum_rows import sum_rows
from support.graphs import graph_of, run

aten = torch.ops.aten


class Products(nn.Module):
    """A weighted sum over the tokens, which is rewritten, and products that stay."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(320, 8)
        self.one_row = nn.Parameter(torch.randn(1, 8))

    def forward(self, input_ids, position_ids):
        hidden = self.embedding(input_ids)  # [B,S,8]
        weights = position_ids.float()[:, None] + 0.5  # [B,1,S]
        mean = weights @ hidden
        scores = hidden @ hidden.transpose(1, 2)
        return mean + scores.sum() + (self.one_row @ hidden.transpose(1, 2)).sum()


def test_only_sums_over_tokens():
    graph = graph_of(Products())
    given = {"input_ids": torch.randint(3, 300, (2, 7)), "position_ids": torch.arange(7).expand(2, -1)}
    before = len(graph.calls(aten.matmul.default))
    sum_rows(graph)
    assert (before, len(graph.calls(aten.matmul.default))) == (3, 2)
    module = Products()
    module.load_state_dict({spec.target: graph.tensors[node] for node, spec in graph.specs.items()})
    torch.testing.assert_close(run(graph, given)["logits"], module(**given), atol=1e-4, rtol=1e-4)
