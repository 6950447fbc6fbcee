"""Layers that evict are grouped by head counts, head dim and rotary dim."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from keysieve.passes.group_layers import group_layers
from keysieve.passes.rope_form import RopeForm
from support.graphs import matched


def layer(number, query_heads, kv_heads, head_dim, rotary_dim, kind="half_split"):
    attention = SimpleNamespace(layer=number, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    form = RopeForm(kind if rotary_dim else "nope", head_dim, rotary_dim, np.ones(rotary_dim // 2))
    return replace(matched("llama").ropes[0], attention=attention, form=form)


def grouped(*layers):
    groups = group_layers([layer(number, *shape) for number, shape in enumerate(layers)])
    return [[match.attention.layer for match in group.matches] for group in groups], [g.suffix for g in groups]


def test_one_shape_is_one_group_whose_names_have_no_suffix():
    assert grouped((4, 2, 16, 16), (4, 2, 16, 16, "interleaved")) == ([[0, 1]], [""])
    assert grouped() == ([], [])


def test_every_size_tells_layers_apart():
    shapes = [(4, 2, 16, 16), (8, 2, 16, 16), (4, 4, 16, 16), (4, 2, 32, 16), (4, 2, 16, 8)]
    assert grouped(*shapes) == ([[0], [1], [2], [3], [4]], ["_0", "_1", "_2", "_3", "_4"])
    assert grouped(*shapes[:2], *shapes[:2])[0] == [[0, 2], [1, 3]]


def test_layers_without_rope_join_the_first_of_their_heads():
    assert grouped((4, 2, 16, 0), (4, 2, 16, 16), (4, 2, 16, 8))[0] == [[0, 1], [2]]
    assert grouped((8, 2, 16, 0), (4, 2, 16, 16), (8, 2, 16, 0))[0] == [[0, 2], [1]]
