"""lower_attend: the same numbers, in operations that ONNX has."""

import pytest
import torch

from keysieve.passes.find_attention import find_attention
from keysieve.passes.gather_logits import gather_logits
from keysieve.passes.insert_cache import insert_cache
from keysieve.passes.lower_attend import lower_attend
from support.graphs import SideBySide, ToyDecoder, graph_of, groups_of, run

ops = torch.ops


def no_rope(query, key, positions):
    return query, key


def with_cache(module):
    graph = graph_of(module)
    attentions = find_attention(graph).matches
    gather_logits(graph)
    insert_cache(graph, attentions, groups_of(attentions), "per_layer_per_head")
    return graph


KINDS = {
    "full": {},
    "window": {"window": 4},
    "chunk": {"chunk": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_but_the_operations(kind):
    module = ToyDecoder(no_rope, **KINDS[kind])
    wanted, found = with_cache(module), with_cache(module)
    lower_attend(found)
    assert not found.calls(ops.keysieve.attend.default)
    fused = found.calls(ops.aten.scaled_dot_product_attention.default)
    assert len(fused) == (kind not in ("softcap", "sinks"))
    capacity, batch, tokens = 12, 2, 3
    given = {}
    for name, node in wanted.inputs.items():
        sizes = [s if isinstance(s, int) else capacity for s in wanted.shape(node)]
        if name in ("input_ids", "logits_at"):
            sizes = [batch, tokens]
        elif name in ("length", "count", "position", "keep", "window_length_0"):
            sizes = [batch]
        elif len(sizes) == 4:
            sizes[1 if name == "plan" else 0] = batch
        given[name] = torch.zeros(sizes, dtype=node.meta["val"].dtype)
    given["input_ids"] = torch.randint(3, 300, (batch, tokens))
    given["logits_at"] = torch.arange(tokens).expand(batch, -1)
    for name in ("key_0", "value_0"):
        given[name] = torch.randn_like(given[name])
    length = "length" if "length" in given else "window_length_0"
    given |= {length: torch.tensor([5, 0]).int(), "position": torch.tensor([5, 0]), "count": torch.tensor([3, 2]).int()}
    if "keep" in given:
        given["keep"] = torch.tensor([-1, -1]).int()
    expected, got = run(wanted, given), run(found, given)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)


def test_layers_that_see_the_same_rows_share_a_mask():
    graph = with_cache(SideBySide(2, 2, 4))
    lower_attend(graph)
    masks = {node.args[3] for node in graph.calls(ops.aten.scaled_dot_product_attention.default)}
    assert len(graph.calls(ops.aten.scaled_dot_product_attention.default)) == 3 and len(masks) == 1
