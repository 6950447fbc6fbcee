import pytest
import torch
from torch import nn

from keysieve.compiler.capture import capture
from keysieve.errors import CaptureError, MatchError
from keysieve.passes.find_attention import find_attention
from keysieve.passes.result import Miss
from support.graphs import ToyDecoder, graph_of, match, matched
from support.tiny_models import tiny_model


def no_rope(query, key, positions):
    return query, key


@pytest.mark.parametrize(
    ("name", "layers", "heads", "kv_heads", "head_dim"),
    [("llama", 3, 4, 2, 16), ("qwen3", 3, 4, 2, 32), ("gpt_neox", 3, 4, 4, 16), ("smollm3", 4, 4, 2, 16)],
)
def test_every_layer_of_a_model_is_listed_in_order(name, layers, heads, kv_heads, head_dim):
    graph = matched(name).graph
    found = find_attention(graph)
    assert not found.misses and [match.layer for match in found.matches] == list(range(layers))
    order = list(graph.fx.nodes)
    places = [order.index(match.node) for match in found.matches]
    assert places == sorted(places)
    for attention in found.matches:
        assert (attention.query_heads, attention.kv_heads) == (heads, kv_heads), "K and V are not repeated"
        assert (attention.head_dim, attention.value_dim) == (head_dim, head_dim)
        assert attention.scale == pytest.approx(head_dim**-0.5)
        assert (attention.window, attention.softcap, attention.sinks) == (0, 0, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 7, "chunk": 8}, "a sliding window of 7 tokens in chunks of 8"),
        ({"heads": 4, "kv_heads": 3}, "4 query heads are not a multiple of 3 KV heads"),
    ],
)
def test_attention_that_cannot_get_a_cache_is_a_miss(options, reason):
    if "kv_heads" in options:  # no such attention runs, so the node is edited afterwards
        graph = graph_of(ToyDecoder(no_rope, kv_heads=2))
        (node,) = graph.calls(torch.ops.keysieve.attention.default)
        key = node.args[1]
        key.meta["val"] = key.meta["val"].new_empty(*key.meta["val"].shape[:1], 3, *key.meta["val"].shape[2:])
    else:
        graph = graph_of(ToyDecoder(no_rope, **options))
        (node,) = graph.calls(torch.ops.keysieve.attention.default)
    found = find_attention(graph)
    assert not found.matches
    (miss,) = found.misses
    assert (miss.layer, miss.node) == (0, node.name) and reason in miss.reason


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": 7}, (7, 0, 0.0, False)),
        ({"chunk": 8}, (0, 8, 0.0, False)),
        ({"softcap": 30.0}, (0, 0, 30.0, True)),
    ],
)
def test_options_of_an_attention(options, expected):
    (found,) = find_attention(graph_of(ToyDecoder(no_rope, **options))).matches
    assert (found.window, found.chunk, found.softcap, found.evicts) == expected


class Sinks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(320, 32)
        self.sinks = nn.Parameter(torch.zeros(4))

    def forward(self, input_ids, position_ids):
        x = self.embedding(input_ids).unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.ops.keysieve.attention(x, x, x, self.sinks, None, 0.5, 0, 0, 0.0, 0).transpose(1, 2).flatten(2)


def test_sink_logits_of_an_attention():
    graph = graph_of(Sinks())
    (found,) = find_attention(graph).matches
    assert found.sinks is not None and graph.shape(found.sinks) == (4,) and found.evicts


class NoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(320, 16), nn.Linear(16, 320)

    def forward(self, input_ids, position_ids):
        return self.out(self.embedding(input_ids).cumsum(1))


def test_a_model_without_attention_is_an_error():
    with pytest.raises(MatchError, match="no attention was found"):
        find_attention(graph_of(NoAttention()))


def test_gpt2_has_no_rope_in_any_layer():
    found = match("gpt2")
    assert not found.misses and [rope.form.kind for rope in found.ropes] == ["nope", "nope"]
    with pytest.raises(MatchError, match=r"none of the 2 attention layers has a rotary embedding \(node attention "):
        found.require_all()


def test_an_encoder_is_refused_at_capture():
    with pytest.raises(CaptureError, match=r"layer \d \(BertSelfAttention\): attention is not causal"):
        capture(tiny_model("bert"))


def test_require_all_lists_every_miss():
    found = matched("llama")
    miss = Miss(0, "attention", "sliding window in chunks")
    broken = type(found)(found.graph, found.attentions, found.ropes, [miss] * 12)
    with pytest.raises(MatchError) as caught:
        broken.require_all()
    message = str(caught.value)
    assert message.startswith(
        "12 of 15 attention layers cannot be rewritten:\n  layer 0, node attention: sliding window"
    )
    assert "and 2 more" in message and "keysieve inspect" in message
    assert found.require_all() is found.ropes
