"""attention_forms: which nodes are taken for attention, and what is read there."""

import torch
from torch import Tensor, nn

from keysieve.passes.attention_forms import read_attentions
from support.graphs import graph_of
from support.tiny_models import VOCABULARY

aten = torch.ops.aten


class Mixed(nn.Module):
    """matmul-softmax-matmul, a softmax over experts, a softmax of four axes that feeds no product, and torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        x = hidden.unflatten(-1, (4, 8)).transpose(1, 2)
        x = (x @ x.transpose(2, 3) / 2.0).softmax(-1) @ x
        x = x * x.softmax(-1)
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2) * hidden.softmax(-1))


def test_forms_are_read_in_graph_order_and_a_routers_softmax_is_left_out() -> None:
    found = read_attentions(graph_of(Mixed()))
    assert [node.target for node, _ in found] == [
        aten.softmax.int,
        aten.softmax.int,
        aten.scaled_dot_product_attention.default,
    ]
    products, odd, fused = (anchor for _, anchor in found)
    assert products is not None and (products.scale, products.mask, products.causal) == (0.5, None, False)
    assert products.result.target is aten.matmul.default and products.query is products.key is products.value
    assert odd is None, "a softmax of four axes that no form reads is said, not passed over"
    assert fused is not None and (fused.scale, fused.mask, fused.causal) == (8**-0.5, None, True)
    assert fused.result.target is aten.scaled_dot_product_attention.default
