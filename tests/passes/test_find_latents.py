"""Keys and values that are both expanded from one narrower latent, and all that only looks like it."""

import pytest
from torch import nn

from keysieve.compiler.pipeline import find
from keysieve.compiler.progress import Progress
from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_latents import find_latents
from support.families import family_model
from support.graphs import ToyDecoder, graph_of, matched
from support.tiny_models import VOCABULARY

WIDTH = 16  # of a toy's embedding; a row of its cache is 2 KV heads of 8 + 8 numbers unless said otherwise


def test_latent_attention():
    found = find(family_model("deepseek_v2"), Progress(quiet=True), only_to_find=True)
    assert found.latents == find_latents(found.graph, found.attentions) == {0: 16, 1: 16, 2: 16}


def test_projections_of_the_hidden_state_have_no_latent():
    assert matched("llama").latents == {}


def latents_of(toy):
    graph = graph_of(toy)
    return find_latents(graph, find_attention(graph).matches)


def toy(**sizes):
    return ToyDecoder(lambda query, key, positions: (query, key), **sizes)


@pytest.mark.parametrize(
    ("width", "sizes", "latents"),
    [
        (4, {}, {0: 4}),
        (WIDTH, {}, {}),  # as wide as what it was made from
        (12, {"kv_heads": 1, "head_dim": 4}, {}),  # wider than a row of the cache
    ],
)
def test_a_latent_is_narrower_than_its_source_and_the_row(width, sizes, latents):
    model = toy(**sizes)
    model.embedding = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, width), nn.LayerNorm(width))
    for name in ("query", "key", "value"):
        setattr(model, name, nn.Linear(width, getattr(model, name).out_features))
    assert latents_of(model) == latents


@pytest.mark.parametrize("narrowed", [["value"], ["key", "value"]])
def test_projections_of_low_rank_are_no_latent_of_both(narrowed):
    model = toy()
    for name in narrowed:
        setattr(model, name, nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, getattr(model, name).out_features)))
    assert latents_of(model) == {}
