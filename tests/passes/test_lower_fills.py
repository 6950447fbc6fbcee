import pytest
import torch
from torch import nn

from keysieve.passes.lower_fills import lower_fills
from support.graphs import ToyDecoder, graph_of, run

EMPTY = torch.ops.aten.new_empty.default
TOKENS = {"input_ids": torch.randint(3, 300, (2, 5)), "position_ids": torch.arange(5).repeat(2, 1)}


def parts(key):
    """What the key is put together from: each head's own dims, and one head's dims that all share."""
    return key[..., :5], key[:, :1, :, 5:].expand(-1, key.shape[1], -1, -1)


class Filled(nn.Module):
    """As in DeepSeek's latent attention."""

    def forward(self, query, key, positions):
        own, shared = parts(key)
        whole = key.new_empty(*key.shape[:-1], 8)
        whole[..., 5:].copy_(shared)
        whole[..., :5].copy_(own)
        return query, whole


class Broadcast(Filled):
    """copy_ expands its source."""

    def forward(self, query, key, positions):
        whole = key.new_empty(*key.shape[:-1], 8)
        whole[..., :5].copy_(key[..., :5])
        whole[..., 5:].copy_(key[:, :1, :, 5:])
        return query, whole


class Overlapping(Filled):
    def forward(self, query, key, positions):
        own, shared = parts(key)
        whole = key.new_empty(*key.shape[:-1], 8)
        whole[..., 4:].copy_(key[..., 4:])
        whole[..., :5].copy_(own)
        whole[..., 5:].copy_(shared)
        return query, whole


class ReadBefore(Filled):
    """A part is read before the whole is there."""

    def forward(self, query, key, positions):
        own, shared = parts(key)
        whole = key.new_empty(*key.shape[:-1], 8)
        whole[..., :5].copy_(own)
        early = whole + 0
        whole[..., 5:].copy_(shared)
        return query + early.mean(1, keepdim=True)[..., :1] * 0, whole


def expected(toy):
    """The same with a cat in the model itself."""

    def cat(query, key, positions):
        return query, torch.cat(parts(key), -1)

    other = ToyDecoder(cat)
    other.load_state_dict(toy.state_dict())
    return other(**TOKENS)


@pytest.mark.parametrize("rope", [Filled, Broadcast])
def test_fill_becomes_a_cat(rope):
    toy = ToyDecoder(rope())
    graph = graph_of(toy)
    assert lower_fills(graph) == 1
    assert not graph.calls(EMPTY) and not graph.calls(torch.ops.aten.copy_.default)
    torch.testing.assert_close(run(graph, TOKENS)["logits"], expected(toy))


@pytest.mark.parametrize("rope", [Overlapping, ReadBefore])
def test_other_fills_are_left_alone(rope):
    graph = graph_of(ToyDecoder(rope()))
    nodes = len(graph.fx.nodes)
    assert lower_fills(graph) == 0
    assert len(graph.fx.nodes) == nodes and graph.calls(EMPTY)
