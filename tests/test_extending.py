"""docs/extending.md, run: what the page adds is missed without it, and found with it."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import Node

from keysieve.passes import attention_forms, rope_forms
from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_rope import find_rope
from keysieve.passes.graph import Graph
from keysieve.passes.lower_attention import lower_attention
from keysieve.passes.result import Found, RopeAttention
from keysieve.passes.rope_forms import lower_rope, rope_form
from support.graphs import ToyDecoder, graph_of, run
from support.tiny_models import VOCABULARY

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@cache
def operator() -> Any:
    """The page's rotary kernel, which torch lets nobody register twice."""
    return code(3)["rotary"]


def code(number: int) -> dict[str, Any]:
    """The names that a code block of the page defines."""
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[number], names)
    return names


@pytest.fixture(autouse=True)
def own_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block registers is gone after the test."""
    forms = {operator: list(readers) for operator, readers in attention_forms.FORMS.items()}
    monkeypatch.setattr(attention_forms, "FORMS", forms)
    monkeypatch.setattr(rope_forms, "FORMS", dict(rope_forms.FORMS))


class Decoder(nn.Module):
    """One layer with the page's attention; keys and values are repeated for their group, as models do it."""

    def __init__(self, attention: Any):
        super().__init__()
        self.attention = attention
        self.embedding, self.out = nn.Embedding(VOCABULARY, 32), nn.Linear(HEADS * HEAD_DIM, VOCABULARY)
        self.query, self.key, self.value = (nn.Linear(32, n * HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (key, value))
        return self.out(self.attention(query, key, value, position_ids).transpose(1, 2).flatten(2))


def decoder_and_graph(attention: Any = None) -> tuple[Decoder, Graph]:
    decoder = Decoder(attention or code(0)["attention"])
    return decoder, graph_of(decoder)


def test_without_the_form_the_attention_is_a_miss() -> None:
    _, graph = decoder_and_graph()
    (miss,) = lower_attention(graph)
    assert miss.reason == "no known form of attention is written around this aten.softmax.int (docs/extending.md)"
    assert miss.reason.split(" (")[0] in PAGE


@torch.no_grad()
def test_one_function_adds_the_form() -> None:
    code(1)
    decoder, graph = decoder_and_graph()
    assert lower_attention(graph) == []
    (attention,) = find_attention(graph).matches
    assert (attention.query_heads, attention.kv_heads, attention.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (attention.scale, attention.window, attention.softcap, attention.sinks) == (0.25, 0, 0, None)
    given = {"input_ids": torch.randint(3, 300, (2, 11)), "position_ids": torch.arange(11).repeat(2, 1)}
    torch.testing.assert_close(run(graph, given)["logits"], decoder(**given), rtol=1e-5, atol=1e-5)


def test_what_a_form_says_is_verified() -> None:
    code(1)

    def squared(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Written like the page's, but its values are squared on the way."""
        return code(0)["attention"](query, key, value * value, positions)

    def shifted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen = positions[:, None, :, None] > positions[:, None, None, :]
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * 0.25 + torch.where(seen, 0.0, -1e9)
        return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), value)

    def crossed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen = positions[:, None, :, None] >= positions[:, None, None, :]
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * 0.25 + torch.where(seen, 0.0, -1e9)
        return torch.einsum("bhqk,bhqd->bhkd", logits.softmax(-1), value)

    assert lower_attention(decoder_and_graph(squared)[1]) == []  # value * value is a value like any other
    (miss,) = lower_attention(decoder_and_graph(shifted)[1])
    assert "neither causal nor" in miss.reason
    (miss,) = lower_attention(decoder_and_graph(crossed)[1])
    assert miss.reason == "the result is not causal softmax attention of its query, key and value"


# -- RoPE ------------------------------------------------------------------------------------------------------

FREQUENCIES = torch.tensor([1.0, 0.3, 0.05, 0.002])


def rotated(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A toy decoder's RoPE with the page's kernel."""
    angles = positions[:, None, :, None].float() * FREQUENCIES.repeat(2)
    return operator()(query, key, angles.cos(), angles.sin())


def search(graph: Graph) -> Found[RopeAttention]:
    lower_rope(graph)
    return find_rope(graph, find_attention(graph).matches)


def test_a_new_pairing_needs_nothing() -> None:
    (rope,) = search(graph_of(ToyDecoder(code(2)["mirrored"]))).matches
    assert rope.form.kind == "paired" and rope.form.rotary_dim == 8
    real, imaginary = rope.form.pairs
    assert (real.tolist(), imaginary.tolist()) == ([0, 1, 2, 3], [7, 6, 5, 4])
    np.testing.assert_allclose(rope.form.inv_freq, FREQUENCIES.double(), rtol=0, atol=1e-9)


def test_without_the_form_the_rotation_is_a_miss() -> None:
    found = search(graph_of(ToyDecoder(rotated)))
    assert not found.matches and len(found.misses) == 1


@torch.no_grad()
def test_one_function_adds_the_rotation() -> None:
    operator(), code(4)
    decoder = ToyDecoder(rotated)
    graph = graph_of(decoder)
    (rope,) = search(graph).matches
    assert (rope.form.kind, rope.form.rotary_dim, rope.form.scaling) == ("half_split", 8, 1)
    np.testing.assert_allclose(rope.form.inv_freq, FREQUENCIES.double(), rtol=0, atol=1e-9)
    assert not [node for node in graph.fx.nodes if "rotary" in str(node.target)], "ONNX has no such operator"
    given = {"input_ids": torch.randint(3, 300, (2, 11)), "position_ids": torch.arange(11).repeat(2, 1)}
    torch.testing.assert_close(run(graph, given)["logits"], decoder(**given), rtol=1e-5, atol=1e-5)


def test_a_form_that_writes_no_rotation_is_refused() -> None:
    operator()

    @rope_form(torch.ops.example.rotary.default)
    def scaled_only(graph: Graph, node: Node) -> None:
        *tensors, cos, _ = node.args
        for result in list(node.users):
            with graph.before(node):
                result.replace_all_uses_with(graph.call(torch.ops.aten.mul.Tensor, tensors[result.args[1]], cos))

    found = search(graph_of(ToyDecoder(rotated)))
    assert not found.matches and len(found.misses) == 1
