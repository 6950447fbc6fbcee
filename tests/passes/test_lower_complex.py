import pytest
import torch
from torch import nn

from keysieve.passes.lower_complex import lower_complex
from support.graphs import ToyDecoder, graph_of, run

FREQUENCIES = torch.tensor([1.0, 0.3, 0.05, 0.002])
TOKENS = {
    "input_ids": torch.randint(3, 300, (2, 5)),
    "position_ids": torch.tensor([[0, 1, 2, 3, 4], [7, 8, 90, 91, 500]]),
}


class Complex(nn.Module):
    """As in DeepSeek-V2 and Llama 4."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", FREQUENCIES.clone())

    def turns(self, positions):
        angles = positions[..., None].float() * self.frequencies
        return torch.polar(torch.ones_like(angles), angles) * 1.5

    def one(self, x, turns):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None, :, :]).flatten(3).type_as(x)

    def forward(self, query, key, positions):
        turns = self.turns(positions)
        return self.one(query, turns), self.one(key, turns)


class Table(Complex):
    """The same with a table of complex numbers."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(512).float(), FREQUENCIES)
        self.register_buffer("table", torch.polar(torch.full_like(angles, 1.5), angles))

    def turns(self, positions):
        return self.table[positions]


class Conjugated(Complex):
    def turns(self, positions):
        return super().turns(positions).conj()


def is_complex(node):
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


@pytest.mark.parametrize("rope", [Complex, Table])
def test_same_numbers_without_complex_ones(rope):
    toy = ToyDecoder(rope())
    graph = graph_of(toy)
    assert any(map(is_complex, graph.fx.nodes)) and lower_complex(graph)
    assert not any(map(is_complex, graph.fx.nodes))
    torch.testing.assert_close(run(graph, TOKENS)["logits"], toy(**TOKENS), rtol=0, atol=1e-5)


def test_unknown_operation_leaves_the_graph_alone():
    graph = graph_of(ToyDecoder(Conjugated()))
    nodes = len(graph.fx.nodes)
    assert not lower_complex(graph) and len(graph.fx.nodes) == nodes


def test_graph_without_complex_numbers_is_left_alone():
    graph = graph_of(ToyDecoder(lambda query, key, positions: (query, key)))
    assert not lower_complex(graph)
