"""Every form of RoPE: the statistics are the queries before it, and the score is the paper's, key by key.

What is expected of a form is written down here by hand, or read from the model's own rotary module; nothing of it
comes from probing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from keysieve.compiler.config import PolicyConfig
from keysieve.compiler.pipeline import Matched, find
from keysieve.compiler.progress import Progress
from keysieve.kernels import reference
from keysieve.passes.arrange_heads import arrange_heads
from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_rope import find_rope
from keysieve.passes.group_layers import group_layers
from keysieve.passes.insert_cache import insert_cache
from keysieve.passes.lower_complex import lower_complex
from keysieve.passes.lower_positions import lower_positions
from keysieve.passes.policies.triattention import QueryCentres, TriAttention, triattention
from keysieve.passes.tap_prerope import tap_prerope
from support.explicit_scores import explicit_scores
from support.families import CHUNKED, HEADS_OF_16, LATENT, ROUTED, family
from support.graphs import ToyDecoder, graph_of
from support.layer_rope import LayerRope
from support.tiny_models import seeded, tiny_model

HIGH, LOW = torch.tensor([1.0, 0.3, 0.05, 0.002]), torch.tensor([0.7, 0.1, 0.02, 0.0005])
NONE = np.array([], int)
TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
PLACES = torch.stack([torch.arange(9), torch.arange(90, 99)])  # a gap would be the next text, to transformers


@dataclass(frozen=True)
class Layer:
    """What a layer must turn out to be: first and second dim of each pair in the *rotated* head, radians a position;
    source: the pre-RoPE dim that each rotated dim comes from; after: what follows RoPE, of queries [B,H,S,D]."""

    first: np.ndarray
    second: np.ndarray
    frequency: np.ndarray
    scaling: float = 1.0
    source: list[int] = field(default_factory=list)
    after: Callable[[torch.Tensor], torch.Tensor] = lambda query: query

    def rope(self, head_dim: int) -> LayerRope:
        def turns(count: int) -> np.ndarray:
            return self.scaling * np.exp(1j * np.outer(np.arange(count), self.frequency))

        return LayerRope(self.first, self.second, self.frequency, self.scaling, head_dim, turns)


def halves(frequency, start=0, **options) -> Layer:
    bands = np.arange(len(frequency)) + start
    return Layer(bands, bands + len(bands), np.asarray(frequency, np.float64), **options)


def neighbours(frequency, start=0, **options) -> Layer:
    bands = 2 * np.arange(len(frequency)) + start
    return Layer(bands, bands + 1, np.asarray(frequency, np.float64), **options)


# -- toys: one rotation each, of queries or keys x [B,H,S,8] by angles [B,1,S,4] ------------------------------------


def rotate_half(x, angles):
    cos, sin = (torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), -1) * sin


def chunked(x, angles):
    """As in gpt-oss."""
    first, second = torch.chunk(x, 2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def strided(x, angles):
    real, imaginary = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), -1).flatten(-2)


def even_odd(x, angles):
    real, imaginary = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), -1)


def partial(x, angles):
    return torch.cat((rotate_half(x[..., :4], angles[..., :2]), x[..., 4:]), -1)


def multimodal(x, angles):
    """mRoPE as in Qwen2-VL: time, height and width own sections of the bands; in a text all three are alike."""
    planes = torch.stack((angles, angles, angles))
    sections = planes.split([2, 1, 1], -1)
    return rotate_half(x, torch.cat([section[n] for n, section in enumerate(sections)], -1))


def l2_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def normed_after(x, angles):
    return l2_norm(strided(x, angles))


def plain(x, angles):
    return x


class Toy(nn.Module):
    """One layer with a rotation of the test's own."""

    def __init__(self, one, frequency=HIGH, grows=False):
        super().__init__()
        self.one, self.grows = one, grows
        self.register_buffer("frequency", frequency.clone())

    def forward(self, query, key, positions):
        angles = positions[:, None, :, None].float() * self.frequency
        query, key = self.one(query, angles), self.one(key, angles)
        if self.grows:  # by the token's index in the input, as in Llama 4
            index = torch.arange(query.shape[2]).float()
            query = query * (1 + 0.1 * torch.log1p(torch.floor((index + 1) / 4))).view(1, 1, -1, 1)
        return query, key


class Toys(nn.Module):
    """Several such layers side by side."""

    def __init__(self, *ropes):
        super().__init__()
        torch.manual_seed(0)
        self.toys = nn.ModuleList(ToyDecoder(rope) for rope in ropes)

    def forward(self, input_ids, position_ids):
        return sum(toy(input_ids, position_ids) for toy in self.toys)

    def queries(self, tokens):
        return [toy.query(toy.embedding(tokens)).unflatten(-1, (-1, 8)).transpose(1, 2) for toy in self.toys]


EVEN_ODD = [0, 2, 4, 6, 1, 3, 5, 7]
TOYS = {
    "half-split": ([Toy(rotate_half)], [halves(HIGH)]),
    "interleaved": ([Toy(strided)], [neighbours(HIGH)]),
    "chunked": ([Toy(chunked)], [halves(HIGH)]),
    "even/odd in, halves out": ([Toy(even_odd)], [halves(HIGH, source=EVEN_ODD)]),
    "partial": ([Toy(partial)], [halves(HIGH[:2])]),
    "two tables": ([Toy(rotate_half), Toy(rotate_half, LOW)], [halves(HIGH), halves(LOW)]),
    "two pairings": ([Toy(strided), Toy(rotate_half, LOW)], [neighbours(HIGH), halves(LOW)]),
    "multimodal, text alone": ([Toy(multimodal)], [halves(HIGH)]),
    "norm after": ([Toy(normed_after)], [neighbours(HIGH, after=l2_norm)]),
    "none, growing queries": (
        [Toy(rotate_half), Toy(plain, grows=True), Toy(even_odd, LOW)],
        [halves(HIGH), Layer(NONE, NONE, np.zeros(0)), halves(LOW, source=EVEN_ODD)],
    ),
}
BY_INDEX = "norm after, none and growing queries"
# Experts are multiplied in float32 only.
LATENT_DENSE = LATENT | ROUTED | {"first_k_dense_replace": 2, "num_hidden_layers": 2}
NORM_AFTER = HEADS_OF_16 | CHUNKED | {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 0, 1]}
LAST_EVEN_ODD = [*range(16), 16, 18, 20, 22, 17, 19, 21, 23]
MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[..., list[Layer]]]] = {
    "linear": (lambda: tiny_model("llama_linear"), "q_proj", lambda w, s: [halves(w)] * 2),
    "llama3": (lambda: tiny_model("llama_llama3"), "q_proj", lambda w, s: [halves(w)] * 3),
    "yarn": (lambda: tiny_model("llama_yarn"), "q_proj", lambda w, s: [halves(w, scaling=s)] * 3),
    "latent, even/odd in, halves out": (
        lambda: seeded(family("DeepseekV3", **LATENT_DENSE)),
        "q_b_proj",
        lambda w, s: [halves(w, 16, source=LAST_EVEN_ODD)] * 2,
    ),
    "latent, complex": (
        lambda: seeded(family("DeepseekV2", **LATENT_DENSE)),
        "q_b_proj",
        lambda w, s: [neighbours(w, 16)] * 2,
    ),
    BY_INDEX: (
        lambda: seeded(family("Llama4", "Llama4Text", **NORM_AFTER)),
        "q_proj",
        lambda w, s: [neighbours(w, after=l2_norm), Layer(NONE, NONE, np.zeros(0)), neighbours(w, after=l2_norm)],
    ),
}
FORMS = [*TOYS, *MODELS]


@dataclass(frozen=True)
class Case:
    name: str
    matched: Matched
    layers: list[Layer]
    queries: list[torch.Tensor]


@pytest.fixture(scope="module", params=FORMS)
def form(request) -> Case:
    return case(request.param)


def case(name: str) -> Case:
    """A captured graph with its matches, what is expected, and the queries that projections hand to RoPE [B,H,S,D]."""
    if name in TOYS:
        ropes, layers = TOYS[name]
        toys = Toys(*ropes).requires_grad_(False)
        graph = graph_of(toys)
        lower_complex(graph)
        attentions = find_attention(graph).matches
        lower_positions(graph, attentions)
        found = find_rope(graph, attentions)
        matched = Matched(graph, attentions, found.matches, found.misses)
        queries = toys.double().queries(TOKENS)
        toys.float()
    else:
        build, projection, expected = MODELS[name]
        model = build()
        rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
        layers = expected(rotary.inv_freq.double().numpy(), float(rotary.attention_scaling))
        matched = find(model, Progress(quiet=True))
        queries = hooked(model.double(), projection)
    assert not matched.misses, str(matched.misses[0])
    return Case(name, matched, layers, queries)


def hooked(model: nn.Module, projection: str) -> list[torch.Tensor]:
    """What the projections of that name give [B,H,S,D], seen by forward hooks."""
    heads, seen, handles = model.config.num_attention_heads, [], []

    def keep(module, inputs, output):
        seen.append(output.unflatten(-1, (heads, -1)).transpose(1, 2))

    for name, module in model.named_modules():
        if name.endswith(projection):
            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=TOKENS, position_ids=PLACES, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def inputs_of(graph):
    return {graph.inputs["input_ids"]: TOKENS, graph.inputs["position_ids"]: PLACES}


def test_statistics_are_of_the_queries_before_rope(form):
    graph = form.matched.graph
    taps = tap_prerope(graph, form.matched.ropes)
    for tap, layer, query in zip(taps, form.layers, form.queries, strict=True):
        expected = layer.after(query)
        # a model in float64 still has norms in float32, by its own code
        tolerance = 1e-9 if form.name in TOYS else 4e-6 * float(expected.abs().max())
        # without a cache, transformers' Llama 4 counts from 0 whatever position_ids say
        rows = slice(1 if form.name == BY_INDEX else 2)
        found = graph.evaluate(tap, inputs_of(graph))
        torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=tolerance)


def test_score_is_that_of_unrotated_keys(form):
    """Keys from the model itself at PLACES, cached as the engine caches them, against a loop over what is undone."""
    matched, layers = form.matched, form.layers
    graph, first = matched.graph, matched.attentions[0]
    heads, kv_heads, head_dim = first.query_heads, first.kv_heads, first.head_dim
    bands = max(len(layer.first) for layer in layers)
    rotated = [graph.evaluate(attention.key, inputs_of(graph)).numpy() for attention in matched.attentions]
    attentions, ropes = arrange_heads(graph, matched.attentions, matched.ropes)
    cached = [graph.evaluate(attention.key, inputs_of(graph)) for attention in attentions]
    rng = np.random.default_rng(1)
    mean = rng.standard_normal((len(layers), heads, head_dim)).astype(np.float32).astype(np.float64)
    magnitude = np.abs(rng.standard_normal((len(layers), heads, bands)).astype(np.float32).astype(np.float64)) + 6
    policy = PolicyConfig("triattention")
    (group,) = groups = group_layers(ropes)
    cache = insert_cache(graph, attentions, groups, "union")
    options = TriAttention(policy.offsets, policy.aggregation, policy.trig, policy.norm)
    inputs = triattention(graph, cache, group, options, QueryCentres(mean, magnitude))
    position, count = torch.tensor([1200, 1000]), torch.tensor([3, 2], dtype=torch.int32)
    given = {
        graph.inputs["input_ids"]: TOKENS[:, :3],
        graph.inputs["position"]: position,
        graph.inputs["count"]: count,
    }
    centre, weight = (graph.evaluate(node, given) for node in (inputs.centre, inputs.weight))
    length = torch.tensor([TOKENS.shape[1]] * 2)
    attributes = (inputs.policy, heads, inputs.rotary_dim, int(inputs.interleaved))
    scores = reference.score(length, length, position, centre, weight, cached, *attributes).numpy()
    for index, layer in enumerate(layers):
        rope = layer.rope(head_dim)
        source = layer.source or list(range(head_dim))
        for b, places in enumerate(PLACES.numpy()):
            for head in range(heads):
                expected = explicit_scores(
                    rope.undo(rotated[index][b, head * kv_heads // heads], places),
                    places,
                    int(position[b] + count[b]),
                    mean[index, head, source],
                    magnitude[index, head, : len(layer.first)],
                    rope,
                    policy,
                )
                scale = max(1, np.abs(expected).max())
                np.testing.assert_allclose(scores[index, b, head], expected, rtol=0, atol=1e-6 * scale)


def test_arranged_queries_and_keys_have_the_same_product():
    """The engine's attention sees other dims, and no other attention."""
    matched = case("two pairings").matched
    graph = matched.graph

    def products(attentions):
        found = []
        for attention in attentions:
            query, key = (graph.evaluate(node, inputs_of(graph)) for node in (attention.query, attention.key))
            found.append(query @ key.repeat_interleave(2, 1).transpose(2, 3))
        return found

    before = products(matched.attentions)
    attentions, ropes = arrange_heads(graph, matched.attentions, matched.ropes)
    assert [rope.arranged for rope in ropes] == [True, True]
    assert [list(attention.node.args[:2]) for attention in attentions] == [[a.query, a.key] for a in attentions]
    assert attentions[0].key is not matched.attentions[0].key
    for found, wanted in zip(products(attentions), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["half-split", "interleaved"])
def test_what_kernels_know_is_left_alone(name):
    matched = case(name).matched
    nodes = len(matched.graph.fx.nodes)
    attentions, ropes = arrange_heads(matched.graph, matched.attentions, matched.ropes)
    assert attentions is matched.attentions and ropes is matched.ropes and len(matched.graph.fx.nodes) == nodes
