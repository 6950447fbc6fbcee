"""States of layers without attention: unequal sequences in steps of any size are the model on the whole text."""

import pytest
import torch
from torch import nn

from keysieve.passes.carry_states import State, carried_layers, carry_states
from keysieve.passes.find_attention import find_attention
from keysieve.passes.insert_cache import insert_cache
from support.graphs import ToyDecoder, graph_of, groups_of, run

WIDTH = 16  # of ToyDecoder's embedding


class Remembering(nn.Module):
    """A convolution and linear attention before one attention layer."""

    def __init__(self, bias: bool = True, delta: bool = True):
        super().__init__()
        self.delta = delta
        torch.manual_seed(0)
        self.toy = ToyDecoder(lambda query, key, positions: (query, key))
        self.embedding, self.toy.embedding = self.toy.embedding, nn.Identity()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 4)), nn.Parameter(torch.randn(WIDTH)) if bias else None
        self.gates = nn.Linear(WIDTH, 4)

    def forward(self, input_ids, position_ids):
        hidden = self.embedding(input_ids)
        hidden = torch.ops.keysieve.causal_conv(hidden.transpose(1, 2), self.weight, self.bias, 0).transpose(1, 2)
        heads = hidden.unflatten(-1, (2, 8)).transpose(1, 2)
        decay, rate = self.gates(hidden).transpose(1, 2).chunk(2, 1)
        key = heads / heads.norm(dim=-1, keepdim=True)
        read, _ = torch.ops.keysieve.linear_attention(
            heads, key, heads, -decay.abs(), rate.sigmoid(), None, int(self.delta), 1
        )
        return self.toy(read.transpose(1, 2).flatten(2), position_ids)


@pytest.mark.parametrize(("bias", "delta"), [(True, True), (False, False)])
def test_steps_of_any_size_are_the_model(bias: bool, delta: bool) -> None:
    model = Remembering(bias, delta)
    graph = graph_of(model)
    attentions = find_attention(graph).matches
    cache = insert_cache(graph, attentions, groups_of(attentions), "union")
    states = carry_states(graph, cache.count)
    assert states == [State("conv_0", (WIDTH, 3)), State("recurrent_0", (2, 8, 8))]
    state = {s.name: torch.zeros(2, *s.shape) for s in states}
    state |= {name: torch.zeros(2, 2, 16, 8) for name in ("key_0", "value_0")}
    state |= {"position": torch.zeros(2, dtype=torch.int64), "plan": torch.zeros(1, 2, 1, 16, dtype=torch.int32)}
    state |= {"length": torch.zeros(2, dtype=torch.int32), "keep": torch.full((2,), -1, dtype=torch.int32)}
    tokens = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, torch.arange(16).expand(2, -1))
    done = torch.zeros(2, dtype=torch.int64)
    for first, second in ((5, 2), (1, 1), (0, 4), (6, 0), (1, 1), (3, 8)):
        count, size = torch.tensor([first, second]), max(first, second)
        chunk = torch.full((2, size), 7)  # padding that would be seen if it counted
        for b in range(2):
            chunk[b, : count[b]] = tokens[b, done[b] : done[b] + count[b]]
        out = run(graph, state | {"input_ids": chunk, "count": count.int()})
        state |= {name.removesuffix("_next"): value for name, value in out.items() if name.endswith("_next")}
        state["position"] = state["position"] + count
        for b in range(2):
            wanted = expected[b, done[b] : done[b] + count[b]]
            torch.testing.assert_close(out["logits"][b, : count[b]], wanted, rtol=1e-4, atol=1e-5)
        done += count
    assert done.tolist() == [16, 16]


def test_a_layer_must_hold_all_that_its_kind_remembers_by() -> None:
    graph = graph_of(Remembering())
    assert carried_layers(graph, {0: "conv"}) == {0: "conv"}
    assert carried_layers(graph, {0: "linear_attention", 1: "linear_attention"}) == {}, "each has but one of the two"
    assert carried_layers(graph, {0: "", 1: "mamba", 2: "conv"}) == {}
