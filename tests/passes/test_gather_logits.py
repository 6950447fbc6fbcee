import pytest
import torch
from torch import nn

from keysieve.passes.gather_logits import gather_logits
from support.graphs import ToyDecoder, graph_of, match, run
from support.tiny_models import tiny_model

TOKENS = torch.randint(3, 300, (3, 6), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(6).repeat(3, 1)
WANTED = torch.tensor([[5, 0], [2, 2], [0, 3]])


def no_rope(query, key, positions):
    return query, key


class Head(nn.Module):
    """A toy decoder whose logits pass through `after`."""

    def __init__(self, after):
        super().__init__()
        self.toy, self.after = ToyDecoder(no_rope), after

    def forward(self, input_ids, position_ids):
        return self.after(self.toy(input_ids, position_ids), position_ids)


class Sum(nn.Module):
    """Two heads on the same hidden states."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(320, 16), nn.Linear(16, 320), nn.Linear(16, 320)

    def forward(self, input_ids, position_ids):
        hidden = self.embedding(input_ids)
        return self.first(hidden) + self.second(hidden.tanh())


def heads_in(graph):
    """Shapes of the linear layers that give logits."""
    return [
        list(graph.shape(node)) for node in graph.calls(torch.ops.aten.linear.default) if graph.shape(node)[2] == 320
    ]


def check(graph, expected, wanted=WANTED):
    gather_logits(graph)
    given = {"input_ids": TOKENS, "position_ids": POSITIONS, "logits_at": wanted}
    logits = run(graph, given)["logits"]
    assert logits.dtype == torch.float32
    chosen = torch.stack([row[index] for row, index in zip(expected, wanted, strict=True)])
    torch.testing.assert_close(logits, chosen.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_logits_of_the_wanted_tokens_only(name):
    """Cohere scales its logits behind the head."""
    expected = tiny_model(name)(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False).logits
    graph = match(name).graph
    check(graph, expected)
    (head,) = [n for n in graph.calls(torch.ops.aten.linear.default) if list(graph.shape(n.args[1])) == [320, 64]]
    given = {"input_ids": TOKENS, "position_ids": POSITIONS, "logits_at": WANTED}
    graph.outputs = {"logits": head}
    graph.closed = False
    assert run(graph, given)["logits"].shape == (3, 2, 320), "the head is computed for no other token"
    for count in (0, 1):
        graph.outputs = {"logits": head}
        assert run(graph, given | {"logits_at": WANTED[:, :count]})["logits"].shape == (3, count, 320)


@pytest.mark.parametrize(
    "after",
    [
        lambda logits, positions: 30 * torch.tanh(logits / 30),  # softcap
        lambda logits, positions: logits + torch.linspace(0, 1, 320),
        lambda logits, positions: logits.half(),
        lambda logits, positions: logits.log_softmax(-1),
        lambda logits, positions: logits * positions[..., None],  # a factor for every token
        lambda logits, positions: positions[..., None] + logits,
        lambda logits, positions: logits[..., :300],
    ],
    ids=["softcap", "bias", "half", "log_softmax", "token factor", "token term first", "slice"],
)
def test_whatever_follows_the_head_the_result_is_right(after):
    module = Head(after)
    expected = module(TOKENS, POSITIONS)
    check(graph_of(module), expected)


def test_two_heads():
    module = Sum()
    check(graph_of(module), module(TOKENS, POSITIONS))


def test_shapes_after_the_pass_name_the_wanted_tokens():
    graph = match("llama").graph
    gather_logits(graph)
    wanted = graph.shape(graph.inputs["logits_at"])[1]
    assert str(graph.shape(graph.outputs["logits"])[1]) == str(wanted)
