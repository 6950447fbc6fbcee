"""A graph that lost a size that may differ from step to step is refused, whatever lost it."""

from collections.abc import Callable

import pytest
import torch
from torch.export import export
from torch.fx import Node

from keysieve.errors import MatchError
from keysieve.passes.check_sizes import check_sizes
from keysieve.passes.graph import Graph
from keysieve.passes.lower_attend import lower_attend
from support.graphs import SideBySide, ToyDecoder, evicting

aten = torch.ops.aten


def toy(**attention: float) -> ToyDecoder:
    return ToyDecoder(lambda query, key, positions: (query, key), sinks=bool(attention), **attention)


@pytest.mark.parametrize("model", [toy(), toy(softcap=5.0), SideBySide(2, 4)], ids=["plain", "softcap", "two shapes"])
def test_rewritten_graphs_pass(model: torch.nn.Module) -> None:
    graph = evicting(model, "key-norm", "per_layer_per_head")
    check_sizes(graph)
    lower_attend(graph)
    check_sizes(graph)


def a_number_for_a_size(graph: Graph) -> Node:
    """What a pass does that asks for the example: arange(5) is right for 5 tokens."""
    tokens = next(n for n in graph.calls(aten.arange.default) if isinstance(n.args[0], Node))
    tokens.args = (5,)
    return tokens


def a_number_that_cannot_run(graph: Graph) -> Node:
    """[B,S,V] as [3,S,V], for the batch of the example."""
    with graph.before(graph.output_node):
        logits = graph.outputs["logits"]
        shaped = graph.fx.call_function(aten.view.default, (logits, [3, graph.size(logits, 1), 320]))
    shaped.meta["val"] = logits.meta["val"]
    graph.outputs["logits"] = shaped
    return shaped


def a_fake_with_a_number(graph: Graph) -> Node:
    """What a shape rule does that knows the example alone: the node is right, and what is made of its shape is not."""
    (node,) = graph.calls(torch.ops.keysieve.attend.default)
    with graph.fake_mode:
        node.meta["val"] = torch.empty(3, *graph.shape(node)[1:])
    return node


def a_fake_with_another_size(graph: Graph) -> Node:
    (node,) = graph.calls(torch.ops.keysieve.attend.default)
    batch, heads, tokens, width = graph.shape(node)
    with graph.fake_mode:
        node.meta["val"] = torch.empty(tokens, heads, batch, width)
    return node


LOSSES = [a_number_for_a_size, a_number_that_cannot_run, a_fake_with_a_number, a_fake_with_another_size]


@pytest.mark.parametrize("lose", LOSSES)
def test_what_lost_a_size_is_named(lose: Callable[[Graph], Node]) -> None:
    graph = evicting(toy(), "key-norm", "union")
    node = lose(graph)
    with pytest.raises(
        MatchError, match=rf"node {node.name} \(aten|keysieve.* made for one size alone: with tokens 29"
    ):
        check_sizes(graph)


def test_a_size_that_became_a_number_everywhere() -> None:
    """As torch does it where somebody asks for the number: all fake values agree from then on."""
    graph = evicting(toy(), "key-norm", "union")
    assert int(graph.shape(graph.inputs["key_0"])[0]) == 3
    for look in (lambda: check_sizes(graph), graph.program):
        with pytest.raises(MatchError, match="a pass fixes the size 'batch' to 3, so the engine would be right for no"):
            look()


def test_what_was_captured_for_one_size() -> None:
    tokens = torch.zeros(3, 5, dtype=torch.long)
    with torch.no_grad():
        graph = Graph(export(toy().eval(), (tokens, torch.arange(5).repeat(3, 1)), strict=False))
    with pytest.raises(MatchError, match=r"input input_ids was made for one size alone: .* no dynamic size 'batch'"):
        check_sizes(graph)
