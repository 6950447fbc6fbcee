"""join_products: products of one input become one, and everything else is left alone."""

import copy

import torch

from keysieve.export.join_products import join_products

SHAPES = {"q": (16, 4), "k": (8, 4), "v": (8, 4), "odd": (3, 4), "o": (4, 16), "tied": (8, 4), "also": (8, 4)}
SHAPES |= {"q_bias": (16,), "k_bias": (8,)}


def linear(name, x, *weights):
    return [name, "aten::linear", [{"node": x}, *({"node": weight} for weight in weights)], {}]


def program(*calls, outputs=("y",)):
    names = {given["node"] for call in calls for given in call[2][1:] if isinstance(given, dict)}
    return {
        "weights": {name: f"model.{name}" for name in sorted(names) if name in SHAPES},
        "calls": list(calls),
        "outputs": {"logits": outputs[0]},
    }


def test_products_of_one_input_become_one():
    content = program(linear("a", "x", "q"), linear("b", "x", "k"), linear("c", "x", "v"), linear("y", "a", "o"))
    join_products(content, SHAPES)
    joined = "q_k_v"
    assert content["weights"] == {"o": "model.o", joined: ["model.q", "model.k", "model.v"]}
    together = {"node": "a_together"}
    assert content["calls"] == [
        ["a_together", "aten::linear", [{"node": "x"}, {"node": joined}], {}],
        ["a", "aten::slice.Tensor", [together, -1, 0, 16], {}],
        ["b", "aten::slice.Tensor", [together, -1, 16, 24], {}],
        ["c", "aten::slice.Tensor", [together, -1, 24, 32], {}],
        linear("y", "a", "o"),
    ]


def test_biases_are_joined_too_but_not_with_products_that_have_none():
    content = program(linear("a", "x", "q", "q_bias"), linear("b", "x", "k", "k_bias"), linear("y", "x", "v"))
    join_products(content, SHAPES)
    assert content["weights"]["q_bias_k_bias"] == ["model.q_bias", "model.k_bias"]
    assert [call[0] for call in content["calls"]] == ["a_together", "a", "b", "y"]


def test_what_stays_as_it_is():
    """Other inputs, results that would not be aligned, weights with another reader, tied weights, no bias at all."""
    calls = [
        linear("a", "x", "q"),
        linear("b", "z", "k"),
        linear("c", "x", "odd"),
        linear("d", "x", "tied"),
        ["e", "aten::embedding", [{"node": "tied"}, {"node": "x"}], {}],
        linear("f", "x", "also"),
        ["y", "aten::linear", [{"node": "x"}, {"node": "c"}, None], {}],
    ]
    content = program(*calls)
    content["weights"] |= {"also": "model.twin", "v": "model.twin"}
    before = copy.deepcopy(content)
    join_products(content, SHAPES)
    assert content == before


def test_a_slice_of_the_joined_product_is_the_product(root):
    from keysieve.compiler.bundle import PROGRAM
    from keysieve.compiler.config import EvictionConfig, PolicyConfig
    from support.bundles import tiny_bundle

    eviction = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)
    text = (tiny_bundle("llama", eviction, root, target="torch") / PROGRAM).read_text()
    assert text.count('_together","aten::linear"') == 6  # query, key, value; gate, up; in three layers
    x, weights = torch.randn(2, 3, 4), [torch.randn(*SHAPES[name]) for name in ("q", "k")]
    together = torch.nn.functional.linear(x, torch.cat(weights))
    for part, weight in zip(together.split([16, 8], -1), weights, strict=True):
        torch.testing.assert_close(part, torch.nn.functional.linear(x, weight))
