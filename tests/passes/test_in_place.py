"""in_place: steps on buffers that stay where they are do what the graph with inputs and outputs does."""

import pytest
import torch

from keysieve.passes.in_place import in_place
from support.graphs import SideBySide, ToyDecoder, evicting, graph_of, run

BATCH, CAPACITY = 2, 20


def no_rope(query, key, positions):
    return query, key


def buffers(graph):
    """Zeros for every input, for steps of one token."""
    sizes = {str(size.node.expr): CAPACITY for size in graph.symbols.values()}
    batch, tokens = map(str, graph.shape(graph.inputs["input_ids"]))
    sizes |= {batch: BATCH, tokens: 1, str(graph.symbol("N").node.expr): 1}
    found = {}
    for name, node in graph.inputs.items():
        shape = [size if isinstance(size, int) else sizes[str(size)] for size in graph.shape(node)]
        found[name] = torch.zeros(shape, dtype=node.meta["val"].dtype)
    return found | {name: torch.full_like(found[name], value) for name, value in START.items() if name in found}


START = {"keep": -1, "budget": 10, "limit": 16, "count": 1}


@pytest.mark.parametrize("shapes", [(2,), (2, 4, 2)], ids=str)
def test_steps_in_place_are_the_steps_of_the_graph(shapes):
    module = SideBySide(*shapes)
    wanted, found = (evicting(module, "key-norm", "per_layer_per_head") for _ in range(2))
    in_place(found)
    state, held = buffers(wanted), buffers(found)
    rounds = 0
    for step in range(40):
        state["input_ids"][:] = held["input_ids"][:] = torch.tensor([[5 + step], [90 + step]])
        before = {name: tensor.data_ptr() for name, tensor in held.items()}
        expected, got = run(wanted, state), run(found, held)
        torch.testing.assert_close(got["logits"], expected["logits"])
        assert torch.equal(got["evicted"], expected["evicted"])
        rounds += int(got["evicted"][0] > 0)
        state |= {name.removesuffix("_next"): value for name, value in expected.items() if name.endswith("_next")}
        state["position"] = state["position"] + 1
        assert {name: tensor.data_ptr() for name, tensor in held.items()} == before
        for name in ("length", "keep", "position"):
            assert torch.equal(held[name], state[name]), name
    assert rounds >= 4


def test_what_is_left_of_the_outputs():
    graph = evicting(SideBySide(2, 4), "key-norm", "per_layer_per_head")
    in_place(graph)
    ops = torch.ops.keysieve
    assert list(graph.outputs) == ["logits", "evicted"]
    assert not any(graph.calls(getattr(ops, name).default) for name in ("update", "score", "select", "attend"))
    for name, count in (("update_", 2), ("attend_at", 2), ("score_at", 2), ("select_", 2)):
        assert len(graph.calls(getattr(ops, name).default)) == count
    assert {"counters", "addresses_0", "addresses_1"} <= set(graph.inputs)


def test_a_graph_that_evicts_nothing():
    from keysieve.passes.find_attention import find_attention
    from keysieve.passes.gather_logits import gather_logits
    from keysieve.passes.insert_cache import insert_cache

    graph = graph_of(ToyDecoder(no_rope, window=4))
    attentions = find_attention(graph).matches
    gather_logits(graph)
    insert_cache(graph, attentions, [], "per_layer_per_head")
    in_place(graph)
    assert list(graph.outputs) == ["logits"] and "evicted" not in graph.inputs
    held = buffers(graph)
    held["input_ids"][:] = 7
    for _ in range(30):
        run(graph, held)
    assert held["window_length_0"].tolist() == [13, 13]  # trimmed to the 3 that a token sees besides itself, once
    assert held["position"].tolist() == [30, 30]
