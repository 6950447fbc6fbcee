"""Scores of the rewritten graph against the paper's definition: un-rotate every key, and sum over the offsets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from keysieve.compiler.config import PolicyConfig
from keysieve.errors import MatchError
from keysieve.kernels import reference
from keysieve.passes.group_layers import Group
from keysieve.passes.insert_cache import insert_cache
from keysieve.passes.policies.triattention import (
    QueryCentres,
    TriAttention,
    check_rotation,
    common_form,
    offset_factors,
    triattention,
)
from keysieve.passes.probe_rope import rotation_matrix
from keysieve.passes.rope_form import RopeForm
from support.explicit_scores import explicit_scores
from support.graphs import match, matched
from support.layer_rope import LayerRope
from support.masked_reference import DECAY

BATCH, ROWS, TOKENS = 2, 11, 3
POSITION, COUNT = [1200, 37], [3, 2]
OPTIONS = [
    PolicyConfig("triattention"),
    PolicyConfig("triattention", aggregation="max", offset_max=512),
    PolicyConfig("triattention", trig=False),
    PolicyConfig("triattention", norm=False),
    PolicyConfig("triattention", aggregation="max", offset_max=1, norm=False),
]


def with_cache(name):
    """Graph of that tiny model with a cache, the nodes to build on, and its layers."""
    found = match(name)
    (group,) = groups = found.groups
    return found.graph, insert_cache(found.graph, found.attentions, groups, "union"), group


def random_centres(ropes, heads, head_dim, bands):
    """Float32 values, since that is what the engine stores; |q_f| on average larger than the mean's magnitude."""
    rng = np.random.default_rng(1)
    mean = rng.standard_normal((len(ropes), heads, head_dim)).astype(np.float32).astype(np.float64)
    magnitude = np.abs(rng.standard_normal((len(ropes), heads, bands)).astype(np.float32).astype(np.float64)) + 3
    return QueryCentres(mean, magnitude)


def layer_rope(form):
    real, imaginary = form.pairs if form.kind != "nope" else (np.array([], int), np.array([], int))
    return LayerRope(real, imaginary, form.inv_freq, form.scaling, form.head_dim, lambda count: np.zeros(0))


@pytest.mark.parametrize(
    ("name", "policies"),
    [
        ("llama", OPTIONS),
        ("llama_yarn", OPTIONS[:2]),  # attention scaling
        ("gpt_neox", OPTIONS[:3]),  # partial, and [B,S,H,D] is not its layout
        ("cohere", OPTIONS[:2]),  # interleaved
        ("smollm3", OPTIONS[:3]),  # layers without RoPE
    ],
)
def test_scores_equal_the_explicit_loop(name, policies):
    forms = matched(name).ropes
    attention = forms[0].attention
    heads, kv_heads, head_dim = attention.query_heads, attention.kv_heads, attention.head_dim
    bands = common_form(Group(forms)).rotary_dim // 2
    centres = random_centres(forms, heads, head_dim, bands)
    rng = np.random.default_rng(2)
    plain = rng.standard_normal((len(forms), BATCH, kv_heads, ROWS, head_dim))
    places = np.stack([np.sort(rng.permutation(POSITION[b])[:ROWS]) for b in range(BATCH)])
    rotated = plain.copy()
    for layer, rope in enumerate(forms):
        for b in range(BATCH):
            for row, place in enumerate(places[b]):
                if rope.form.kind != "nope":
                    rotated[layer, b, :, row] = plain[layer, b, :, row] @ rotation_matrix(rope.form, place).T
    graph, cache, group = with_cache(name)
    ropes = group.matches
    given = {
        graph.inputs["input_ids"]: torch.zeros(BATCH, TOKENS, dtype=torch.long),
        graph.inputs["position"]: torch.tensor(POSITION),
        graph.inputs["count"]: torch.tensor(COUNT, dtype=torch.int32),
    }
    length, limit = torch.tensor([ROWS, ROWS]), torch.tensor([ROWS, ROWS + 1])
    for policy in policies:
        options = TriAttention(policy.offsets, policy.aggregation, policy.trig, policy.norm)
        inputs = triattention(graph, cache, group, options, centres)
        centre, weight = (graph.evaluate(node, given) for node in (inputs.centre, inputs.weight))
        keys, form = list(torch.from_numpy(rotated)), (heads, inputs.rotary_dim, inputs.interleaved)
        scores = reference.score(
            length, limit, torch.tensor(POSITION), centre, weight, keys, inputs.policy, *form
        ).numpy()
        assert scores.shape == (len(ropes), BATCH, heads, ROWS)
        for layer, rope in enumerate(ropes):
            for b in range(BATCH):
                for head in range(heads):
                    expected = explicit_scores(
                        plain[layer, b, head * kv_heads // heads],
                        places[b],
                        POSITION[b] + COUNT[b],
                        centres.mean[layer, head],
                        centres.magnitude[layer, head],
                        layer_rope(rope.form),
                        policy,
                    )
                    scale = max(1, np.abs(expected).max())
                    np.testing.assert_allclose(scores[layer, b, head], expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "smollm3"])
def test_online_centres_follow_the_queries_token_by_token(name):
    graph, cache, group = with_cache(name)
    triattention(graph, cache, group, TriAttention(PolicyConfig("triattention").offsets), None)
    form, ropes = common_form(group), group.matches
    heads, head_dim, bands = ropes[0].attention.query_heads, form.head_dim, form.rotary_dim // 2
    rng = np.random.default_rng(3)
    size, count = 6, [6, 4]
    queries = rng.standard_normal((len(ropes), BATCH, heads, size, head_dim))
    centre = rng.standard_normal((len(ropes), BATCH, heads, head_dim))
    magnitude = np.abs(rng.standard_normal((len(ropes), BATCH, heads, bands)))
    given = {
        graph.inputs["input_ids"]: torch.zeros(BATCH, size, dtype=torch.long),
        graph.inputs["position"]: torch.zeros(BATCH, dtype=torch.long),
        graph.inputs["count"]: torch.tensor(count, dtype=torch.int32),
        graph.inputs["centre"]: torch.from_numpy(centre),
        graph.inputs["magnitude"]: torch.from_numpy(magnitude),
    }
    for layer, rope in enumerate(ropes):
        value = torch.from_numpy(queries[layer])
        heads_second = graph.shape(rope.query_pre)[1] == heads
        given[rope.query_pre] = value if heads_second else value.transpose(1, 2)
    found = {name: graph.evaluate(graph.outputs[f"{name}_next"], given).numpy() for name in ("centre", "magnitude")}
    real, imaginary = form.pairs
    for b in range(BATCH):
        for token in range(count[b]):
            query = queries[:, b, :, token]
            centre[:, b] = centre[:, b] * DECAY + (1 - DECAY) * query
            size_of_pairs = np.hypot(query[..., real], query[..., imaginary])
            magnitude[:, b] = magnitude[:, b] * DECAY + (1 - DECAY) * size_of_pairs
    rotated = [layer for layer, rope in enumerate(ropes) if rope.form.kind != "nope"]
    np.testing.assert_allclose(found["centre"], centre, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["magnitude"][rotated], magnitude[rotated], rtol=0, atol=1e-9)


def test_offset_factors_are_the_mean_turn_or_one_turn_each():
    form = RopeForm("half_split", 8, 8, np.array([1.0, 0.1, 0.01, 0.001]))
    offsets = [1, 2, 4, 8]
    each = offset_factors(form, offsets, "max")
    assert each.shape == (4, 4)
    for j, offset in enumerate(offsets):
        np.testing.assert_allclose(
            each[j], np.cos(form.inv_freq * offset) + 1j * np.sin(form.inv_freq * offset), rtol=1e-15
        )
    (mean,) = offset_factors(form, offsets, "mean")
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-15)


def test_a_group_has_the_form_of_its_first_rotated_layer():
    ropes = matched("llama").ropes
    plain = [replace(rope, form=RopeForm("nope", 16, 0, np.zeros(0))) for rope in ropes]
    assert common_form(Group([plain[0], ropes[1]])) is ropes[1].form
    none = common_form(Group(plain))
    assert (none.kind, none.head_dim, none.rotary_dim) == ("half_split", 16, 2)
    check_rotation([*plain, ropes[0]])
    with pytest.raises(MatchError, match="no layer that evicts has a rotary embedding"):
        check_rotation(plain)


def test_default_offsets_are_the_papers():
    assert (
        PolicyConfig("triattention").offsets == [1 << n for n in range(13)]
        and PolicyConfig("triattention").aggregation == "mean"
    )
