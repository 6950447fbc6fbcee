import numpy as np
import pytest
import torch
from torch import nn

from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_rope import find_rope
from keysieve.passes.probe_rope import rotation_matrix
from support.graphs import ToyDecoder, graph_of, matched, run
from support.tiny_models import DECODERS, tiny_model

FREQUENCIES = torch.tensor([1.0, 0.3, 0.05, 0.002])


def rotate(x, cos, sin):
    """Half-split RoPE as in transformers' Llama: x [B,H,S,D], cos and sin [B,1,S,D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Llama(nn.Module):
    """Half-split RoPE; tests override one step of it."""

    query_scale = 1.0

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", FREQUENCIES.clone())

    def angles(self, positions):
        """positions [B,S] -> [B,1,S,R/2]."""
        return positions[:, None, :, None].float() * self.frequencies

    def one(self, x, angles):
        angles = torch.cat((angles, angles), -1)
        return rotate(x, angles.cos(), angles.sin())

    def forward(self, query, key, positions):
        angles = self.angles(positions)
        return self.one(query, angles), self.one(key, angles)


def form_of(rope, **options):
    """The form of a toy decoder's only layer; fails where it is missed."""
    found = search(rope, **options)
    assert not found.misses, str(found.misses[0])
    return found.matches[0].form


def miss_of(rope, **options):
    """(reason, node that the miss names) of a toy decoder's only layer."""
    graph = graph_of(ToyDecoder(rope, **options))
    found = find_rope(graph, find_attention(graph).matches)
    assert not found.matches, f"matched as {found.matches[0].form}"
    (miss,) = found.misses
    assert miss.layer == 0
    node = next(node for node in graph.fx.nodes if node.name == miss.node)
    return miss.reason, node


def search(rope, **options):
    graph = graph_of(ToyDecoder(rope, **options))
    return find_rope(graph, find_attention(graph).matches)


# -- models ----------------------------------------------------------------------------------------------------

EXPECTED = {  # kind, head_dim, rotary_dim
    "llama": ("half_split", 16, 16),
    "llama_mha": ("half_split", 16, 16),
    "llama_llama3": ("half_split", 16, 16),
    "llama_linear": ("half_split", 16, 16),
    "llama_yarn": ("half_split", 16, 16),
    "qwen3": ("half_split", 32, 32),
    "gpt_neox": ("half_split", 16, 8),
    "cohere": ("interleaved", 16, 16),
    "smollm3": ("half_split", 16, 16),
}


@pytest.mark.parametrize("name", DECODERS)
def test_form_of_every_tiny_model(name):
    found, model = matched(name), tiny_model(name)
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    assert not found.misses and len(found.ropes) == model.config.num_hidden_layers
    for index, rope in enumerate(found.ropes):
        assert rope.attention.layer == index
        if name == "smollm3" and index % 2:
            assert (rope.form.kind, rope.form.rotary_dim, len(rope.form.inv_freq)) == ("nope", 0, 0)
            assert rope.query_pre is rope.query_post is rope.query_normed is rope.attention.query
            continue
        form = rope.form
        assert (form.kind, form.head_dim, form.rotary_dim) == EXPECTED[name]
        np.testing.assert_allclose(form.inv_freq, rotary.inv_freq.double().numpy(), rtol=0, atol=1e-9)
        assert form.scaling == pytest.approx(rotary.attention_scaling, abs=1e-9)
        if name == "llama_yarn":
            assert form.scaling == pytest.approx(1.1386, abs=1e-4)


# -- the same rotation in other words --------------------------------------------------------------------------


def test_toy_is_found_as_written():
    form = form_of(Llama())
    assert (form.kind, form.head_dim, form.rotary_dim, form.scaling) == ("half_split", 8, 8, 1)
    np.testing.assert_allclose(form.inv_freq, FREQUENCIES.double(), rtol=0, atol=1e-9)


class Chunked(Llama):
    def one(self, x, angles):
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Strided(Llama):
    def one(self, x, angles):
        real, imaginary = x[..., ::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), -1).flatten(-2)


class Complex(Llama):
    """As in Meta's own Llama and DeepSeek: pairs are complex numbers, multiplied by polar(1, angle)."""

    def one(self, x, angles):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).type_as(x)


class ComplexTable(Llama):
    """The same with a precomputed table, indexed by position."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(1024).float(), FREQUENCIES)
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))

    def angles(self, positions):
        return self.table[positions][:, None]

    def one(self, x, turn):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


class SequenceFirst(Llama):
    """Rotated as [B,S,H,D], and transposed afterwards."""

    def one(self, x, angles):
        return super().one(x.transpose(1, 2), angles.transpose(1, 2)).transpose(1, 2)


class Scaled(Llama):
    def one(self, x, angles):
        return super().one(x, angles) * 1.25


class Partial(Llama):
    def one(self, x, angles):
        return torch.cat((super().one(x[..., :6], angles[..., :3]), x[..., 6:]), -1)


class PartialInterleaved(Strided):
    def one(self, x, angles):
        return torch.cat((super().one(x[..., :4], angles[..., :2]), x[..., 4:]), -1)


class PermutedDims(Llama):
    def one(self, x, angles):
        return super().one(x, angles)[..., [1, 0, 2, 3, 5, 4, 6, 7]]


class EvenOdd(Llama):
    """As in DeepSeek-V3: pairs (0, 1), (2, 3), ... go in, halves come out."""

    def one(self, x, angles):
        real, imaginary = x[..., ::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), -1)


class OddPairs(Llama):
    """Pairs (0, 1), (2, 3) by one rule and (4, 6), (5, 7) by another."""

    def one(self, x, angles):
        first, second = x[..., [0, 2, 4, 5]], x[..., [1, 3, 6, 7]]
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return turned[..., [0, 4, 1, 5, 2, 3, 6, 7]]


class LastDims(Llama):
    """As in DeepSeek's heads: the rotated dims come last."""

    def one(self, x, angles):
        return torch.cat((x[..., :4], super().one(x[..., 4:], angles[..., :2])), -1)


class Backwards(Llama):
    """Turned the other way round: the same form with negative frequencies."""

    def angles(self, positions):
        return -super().angles(positions)


@pytest.mark.parametrize(
    ("rope", "kind", "rotary_dim", "scaling", "sign"),
    [
        (Chunked, "half_split", 8, 1, 1),
        (Strided, "interleaved", 8, 1, 1),
        (Complex, "interleaved", 8, 1, 1),
        (ComplexTable, "interleaved", 8, 1, 1),
        (SequenceFirst, "half_split", 8, 1, 1),
        (Scaled, "half_split", 8, 1.25, 1),
        (Partial, "half_split", 6, 1, 1),
        (PartialInterleaved, "interleaved", 4, 1, 1),
        (PermutedDims, "paired", 8, 1, 1),
        (EvenOdd, "paired", 8, 1, 1),
        (OddPairs, "paired", 8, 1, 1),
        (LastDims, "paired", 4, 1, 1),
        (Backwards, "half_split", 8, 1, -1),
    ],
)
def test_form_does_not_depend_on_how_it_is_written(rope, kind, rotary_dim, scaling, sign):
    form = form_of(rope())
    assert (form.kind, form.rotary_dim) == (kind, rotary_dim)
    assert form.scaling == pytest.approx(scaling, abs=1e-7)
    tolerance = 1e-6 if rope is ComplexTable else 1e-9  # the table is float32
    np.testing.assert_allclose(form.inv_freq, sign * FREQUENCIES.double()[: rotary_dim // 2], rtol=0, atol=tolerance)


class RmsNormed(Llama):
    """A norm with weights before RoPE, as in Qwen3."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.norm.weight.data = torch.linspace(0.5, 2, 8)

    def forward(self, query, key, positions):
        return super().forward(self.norm(query), self.norm(key), positions)


def test_pre_rope_tensor_is_behind_the_norm():
    toy = ToyDecoder(RmsNormed())
    graph = graph_of(toy)
    (rope,) = find_rope(graph, find_attention(graph).matches).matches
    graph.outputs = {"pre": rope.query_pre}
    tokens, positions = torch.randint(3, 300, (2, 6)), torch.arange(6).repeat(2, 1)
    pre = run(graph, {"input_ids": tokens, "position_ids": positions})["pre"]
    queries = toy.query(toy.embedding(tokens)).unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(pre, toy.rope.norm(queries), rtol=1e-6, atol=1e-6)


def no_rope(query, key, positions):
    return query, key


def test_without_rotation_the_form_is_nope():
    form = form_of(no_rope)
    assert (form.kind, form.head_dim, form.rotary_dim, form.scaling, len(form.inv_freq)) == ("nope", 8, 0, 1, 0)


# -- what may follow the rotation ------------------------------------------------------------------------------


class Tempered(Llama):
    """Queries that also grow with the position."""

    def scale(self, positions):
        return 1 + 0.1 * torch.log1p(positions.float())

    def forward(self, query, key, positions):
        query, key = super().forward(query, key, positions)
        return query * self.scale(positions)[:, None, :, None], key


class LateTempered(Tempered):
    """As in Ministral 3: the scale is 1 up to a length that no probe of the rotation reaches."""

    def scale(self, positions):
        return 1 + 0.1 * torch.log1p((positions // 16384).float())


class TemperedNope(Tempered):
    """As in some layers of Llama 4: no rotation, and queries that grow with the position."""

    def one(self, x, angles):
        return x


class NormedAfter(Llama):
    """A norm after RoPE, as in Llama 4: not linear, though it is on unit vectors."""

    def one(self, x, angles):
        x = super().one(x, angles)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class TemperedNormedAfter(Tempered, NormedAfter):
    pass


class ScaledPairs(Llama):
    """Both dims of a pair alike, so a turned pair is scaled as an unturned one."""

    def one(self, x, angles):
        return super().one(x, angles) * torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("rope", "kind", "normed", "scaled"),
    [
        (Tempered, "half_split", False, True),
        (LateTempered, "half_split", False, True),
        (TemperedNope, "nope", False, True),
        (NormedAfter, "half_split", True, False),
        (TemperedNormedAfter, "half_split", True, True),
        (ScaledPairs, "half_split", True, False),
    ],
)
def test_norm_and_scale_after_the_rotation(rope, kind, normed, scaled):
    """query = scale(position) * normed(rotated(query_pre)), and the three nodes say where each begins."""
    graph = graph_of(ToyDecoder(rope()))
    found = find_rope(graph, find_attention(graph).matches)
    assert not found.misses, str(found.misses[0])
    (match,) = found.matches
    assert match.form.kind == kind
    assert (match.query_normed is not match.query_post) == normed
    assert (match.attention.query is not match.query_normed) == scaled
    tokens = torch.randint(3, 300, (2, 6))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 9, 11, 40000, 50000, 60000]])
    given = {graph.inputs["input_ids"]: tokens, graph.inputs["position_ids"]: positions}
    nodes = (match.query_pre, match.query_post, match.attention.query)
    pre, post, query = (graph.evaluate(node, given) for node in nodes)
    turn = torch.from_numpy(np.stack([[rotation_matrix(match.form, int(p)) for p in row] for row in positions]))
    torch.testing.assert_close(torch.einsum("bsoi,bhsi->bhso", turn, pre), post, rtol=0, atol=1e-9)
    normed_pre = graph.evaluate(match.query_normed, given | {match.query_post: pre})
    turned = torch.einsum("bsoi,bhsi->bhso", turn, normed_pre)
    scale = rope().scale(positions)[:, None, :, None].double() if scaled else 1
    torch.testing.assert_close(turned * scale, query, rtol=1e-6, atol=1e-9)


# -- rotations that are refused --------------------------------------------------------------------------------


class Quadratic(Llama):
    def angles(self, positions):
        return (positions * positions)[:, None, :, None].float() * self.frequencies


class Logarithmic(Llama):
    """Linear at positions 0 and 1, and nowhere else."""

    def angles(self, positions):
        return torch.log2(positions[:, None, :, None].float() + 1) * self.frequencies


class Capped(Llama):
    """Linear up to 20, then constant: only a far position shows it."""

    def angles(self, positions):
        return positions.clamp(max=20)[:, None, :, None].float() * self.frequencies


class Shifted(Llama):
    def angles(self, positions):
        return super().angles(positions + 1)


class PerHead(Llama):
    def one(self, x, angles):
        heads = torch.linspace(0.5, 1, x.shape[1])[None, :, None, None]
        return super().one(x, angles * heads)


class ScaledRest(Llama):
    def one(self, x, angles):
        return torch.cat((super().one(x[..., :4], angles[..., :2]), 2 * x[..., 4:]), -1)


class ScaledBands(Chunked):
    """The table itself is larger for some bands."""

    def one(self, x, angles):
        first, second = x.chunk(2, -1)
        size = torch.tensor([1.0, 2, 3, 4])
        cos, sin = size * angles.cos(), size * angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Reflected(Llama):
    """The sign of one product is wrong, so a pair is not turned but sheared."""

    def one(self, x, angles):
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos + second * sin, second * cos + first * sin), -1)


class WeightedAfter(Llama):
    """A weight for each dim after RoPE: the two dims of a pair are no longer alike."""

    def one(self, x, angles):
        return super().one(x, angles) * torch.linspace(0.5, 2, 8)


class WeightedNormAfter(NormedAfter):
    """As in HunYuan."""

    def one(self, x, angles):
        return super().one(x, angles) * torch.linspace(0.5, 2, 8)


class Twice(Llama):
    def one(self, x, angles):
        return super().one(super().one(x, angles), angles)


class Swapped(Tempered):
    """The scale is negative from some position on, so it turns the queries, too."""

    def scale(self, positions):
        return 1 - 0.1 * positions


class TemperedKeys(Llama):
    def forward(self, query, key, positions):
        query, key = super().forward(query, key, positions)
        return query, key * (1 + 0.1 * positions)[:, None, :, None]


class Biased(Llama):
    def one(self, x, angles):
        return super().one(x, angles) + 0.5


class OtherKeys(Llama):
    def forward(self, query, key, positions):
        angles = self.angles(positions)
        return self.one(query, angles), self.one(key, angles * 2)


class PlainKeys(Llama):
    def forward(self, query, key, positions):
        return self.one(query, self.angles(positions)), key


class ScaledKeys(Llama):
    def forward(self, query, key, positions):
        query, key = super().forward(query, key, positions)
        return query, key * 1.5


class Counted(Llama):
    """Positions from the shape of the input, not from position_ids: wrong as soon as there is a cache."""

    def forward(self, query, key, positions):
        return super().forward(query, key, torch.arange(query.shape[2])[None])


LINEAR = torch.ops.aten.linear.default
ATTENTION = torch.ops.keysieve.attention.default
PROPORTIONAL = "the pairs of dims are not turned by angles proportional to the position"
COMMUTE = "does not commute with the rotation"


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (Quadratic, PROPORTIONAL),
        (Logarithmic, PROPORTIONAL),
        (Capped, PROPORTIONAL),
        (Reflected, PROPORTIONAL),
        (Swapped, "do not turn in pairs"),
        (Shifted, "no permutation"),
        (Biased, COMMUTE),
        (WeightedAfter, COMMUTE),
        (WeightedNormAfter, COMMUTE),
        (PerHead, "heads are rotated differently"),
        (ScaledRest, "the dims that are not rotated are scaled"),
        (ScaledBands, "does not scale all rotated dims alike"),
        (Twice, "the position enters before the rotation, too"),
        (Counted, "position_ids"),
    ],
)
def test_wrong_rotation_is_a_miss_with_its_reason(rope, reason):
    found, node = miss_of(rope())
    assert reason in found
    assert node.meta["val"].shape[-1] == 8, "the node is the rotation's input, not the projection before it"


@pytest.mark.parametrize("rope", [OtherKeys, PlainKeys, TemperedKeys])
def test_keys_must_turn_as_the_queries_do(rope):
    reason, node = miss_of(rope())
    assert reason.startswith("queries have RoPE half_split but keys ")
    assert node.target is ATTENTION


def test_keys_may_be_scaled():
    """The score takes the cached key as it is."""
    assert form_of(ScaledKeys()).scaling == 1


class SharedKeyPart(Llama):
    """As in latent attention: one rotated part, expanded to all heads behind what is each head's own."""

    def forward(self, query, key, positions):
        angles = self.angles(positions)[..., :2]
        query = torch.cat((query[..., :4], self.one(query[..., 4:], angles)), -1)
        shared = self.one(key[:, :1, :, 4:], angles).expand(-1, key.shape[1], -1, -1)
        return query, torch.cat((key[..., :4], shared), -1)


class SharedKeyPartTurnedBackwards(SharedKeyPart):
    def forward(self, query, key, positions):
        return super().forward(query, key, positions)[0], super().forward(query, key, -positions)[1]


def test_keys_need_no_single_tensor_before_rope():
    form = form_of(SharedKeyPart())
    assert (form.kind, form.real, form.imaginary, form.layout) == ("paired", (4, 5), (6, 7), tuple(range(8)))
    reason, _ = miss_of(SharedKeyPartTurnedBackwards())
    assert reason == "queries have RoPE paired partial 4/8 but keys are not turned alike"


def test_one_bad_layer_does_not_hide_the_good_ones():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = ToyDecoder(Llama()), ToyDecoder(Quadratic())

        def forward(self, input_ids, position_ids):
            return self.good(input_ids, position_ids) + self.bad(input_ids, position_ids)

    graph = graph_of(Two())
    found = find_rope(graph, find_attention(graph).matches)
    assert [match.attention.layer for match in found.matches] == [0]
    assert [miss.layer for miss in found.misses] == [1]
    assert str(found.misses[0]).startswith("layer 1, node ")
