import pytest
import torch
from torch import nn

from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_rope import find_rope
from keysieve.passes.lower_positions import lower_positions
from support.graphs import ToyDecoder, graph_of

POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 90, 91, 500]])


class Grown(nn.Module):
    """As in Llama 4: queries scaled by a number that depends on the token's index in the input."""

    def factor(self, index):
        return 1 + 0.1 * torch.log1p(torch.floor((index + 1) / 4))

    def forward(self, query, key, positions):
        batch, _, tokens, _ = query.shape
        factor = self.factor(torch.arange(tokens).float()).view(1, 1, tokens, 1)
        return query * factor.expand(batch, 1, tokens, 1), key


class Rotated(nn.Module):
    """A whole rotary embedding by the index, with a table that has no batch: [1,1,S,D]."""

    def forward(self, query, key, positions):
        angles = torch.arange(query.shape[2])[None, None, :, None].float() * torch.tensor([1.0, 0.3, 0.05, 0.002])
        cos, sin = angles.cos(), angles.sin()

        def one(x):
            first, second = x.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

        return one(query), one(key)


class Summed(Grown):
    """What a token gets depends on those before it, so it is no function of its index alone when some are left out."""

    def factor(self, index):
        return 1 + torch.cumsum(index, 0) / 100


class NoBatch(Grown):
    """A table [S,D] has no axis that could become the batch."""

    def forward(self, query, key, positions):
        return query * (1 + torch.arange(query.shape[2])[:, None].float().expand(-1, 8)), key


def both(rope):
    graph = graph_of(ToyDecoder(rope))
    attentions = find_attention(graph).matches
    query = attentions[0].query
    given = {graph.inputs["input_ids"]: torch.zeros_like(POSITIONS), graph.inputs["position_ids"]: POSITIONS}
    return graph, attentions, query, given


def test_scale_follows_position_ids():
    graph, attentions, query, given = both(Grown())
    assert [miss.reason for miss in find_rope(graph, attentions).misses]
    assert lower_positions(graph, attentions) == 1
    (match,) = find_rope(graph, attentions).matches
    assert match.form.kind == "nope"
    found, plain = graph.evaluate(query, given), graph.evaluate(match.query_pre, given)
    factor = Grown().factor(POSITIONS.double())[:, None, :, None]
    torch.testing.assert_close(found, plain * factor, rtol=1e-6, atol=0)


def test_rotation_follows_position_ids():
    graph, attentions, _, _ = both(Rotated())
    assert lower_positions(graph, attentions) >= 2
    (match,) = find_rope(graph, attentions).matches
    assert (match.form.kind, match.form.rotary_dim) == ("half_split", 8)


@pytest.mark.parametrize("rope", [Summed, NoBatch])
def test_others_stay_and_are_refused(rope):
    graph, attentions, _, _ = both(rope())
    assert lower_positions(graph, attentions) == 0
    (miss,) = find_rope(graph, attentions).misses
    assert "index in the input instead of on position_ids" in miss.reason
