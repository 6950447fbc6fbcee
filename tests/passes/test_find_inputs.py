"""The common input of q, k and v is what the model's own projections read; where there is none, the miss says why."""

import pytest
import torch
from torch import nn

from keysieve.compiler.pipeline import find
from keysieve.compiler.progress import Progress
from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_inputs import find_inputs, inputs_or_misses
from support.families import family_model
from support.graphs import ToyDecoder, graph_of, matched
from support.tiny_models import DECODERS, tiny_model

TOKENS = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.stack([torch.arange(13), torch.arange(90, 103)])


def hooked_inputs(model):
    """What q_proj (or the fused projection) of every layer reads, [B,S,d]."""
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "query_key_value", "c_attn")):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False)
    return seen


@pytest.mark.parametrize("name", DECODERS)
def test_the_input_is_what_the_projections_read(name):
    found = matched(name)
    inputs = find_inputs(found.graph, found.attentions)
    expected = hooked_inputs(tiny_model(name).double())
    given = {found.graph.inputs["input_ids"]: TOKENS, found.graph.inputs["position_ids"]: POSITIONS}
    assert list(inputs) == [attention.layer for attention in found.attentions] == list(range(len(expected)))
    for node, wanted in zip(inputs.values(), expected, strict=True):
        value = found.graph.evaluate(node, given)
        # The hooked model is float64, but its norms and angles are float32 by its own code.
        torch.testing.assert_close(value, wanted, rtol=0, atol=4e-6 * float(wanted.abs().max()))


def test_products_of_flattened_rows_count():
    """GPT-2 projects with addmm on [B*S, d], all three at once."""
    model = tiny_model("gpt2")
    graph = find(model, Progress(quiet=True)).graph
    inputs = find_inputs(graph, find_attention(graph).matches)
    value = graph.evaluate(
        inputs[1], {graph.inputs["input_ids"]: TOKENS, graph.inputs["position_ids"]: torch.arange(13).repeat(2, 1)}
    )
    expected = []
    for block in model.double().transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: expected.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    torch.testing.assert_close(value, expected[1], rtol=0, atol=1e-6)


def test_latent_attention_has_no_common_input():
    found = find(family_model("deepseek_v2"), Progress(quiet=True), only_to_find=True)
    answer = inputs_or_misses(found.graph, found.attentions)
    assert find_inputs(found.graph, found.attentions) == {} == dict(answer.matches)
    assert [miss.layer for miss in answer.misses] == [0, 1, 2]
    for miss, attention in zip(answer.misses, found.attentions, strict=True):
        assert miss.node == attention.node.name
        assert "projected from more than one input: query from" in miss.reason


@pytest.mark.parametrize("other", ["query", "key", "value"])
def test_one_projection_of_another_input_is_a_miss(other):
    toy = ToyDecoder(lambda query, key, positions: (query, key))
    setattr(toy, other, nn.Sequential(nn.LayerNorm(16), getattr(toy, other)))
    graph = graph_of(toy)
    answer = inputs_or_misses(graph, find_attention(graph).matches)
    assert answer.matches == []
    assert "more than one input" in str(answer.misses[0])
    assert f"{'value' if other == 'value' else 'key'} from" in answer.misses[0].reason


def test_what_no_projection_made_is_a_miss():
    toy = ToyDecoder(lambda query, key, positions: (query, key), kv_heads=2)
    toy.value = nn.Identity()  # two KV heads of the embedding itself
    graph = graph_of(toy)
    (miss,) = inputs_or_misses(graph, find_attention(graph).matches).misses
    assert miss.reason.startswith("its value comes from embedding (aten.embedding.default), which is no linear")
