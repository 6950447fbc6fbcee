"""The tapped queries and keys are those of the attention nodes, and layers without a common input have no tap."""

import pytest
import torch

from keysieve.compiler.pipeline import find
from keysieve.compiler.progress import Progress
from keysieve.passes.tap_inputs import tap_inputs
from keysieve.passes.tap_prerope import tap_only
from support.families import family_model
from support.graphs import match, matched, run

TOKENS = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(3))
GIVEN = {"input_ids": TOKENS, "position_ids": torch.arange(13).repeat(2, 1)}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_taps_stand_beside_the_queries(name):
    found, plain = match(name), matched(name)
    tap_only(found.graph, found.ropes)
    tap_inputs(found.graph, found.ropes)
    names = list(found.graph.outputs)
    assert names[:3] == ["query_pre_0", "query_pre_1", "query_pre_2"]
    assert names[3:] == [f"{kind}_{layer}" for layer in range(3) for kind in ("hidden", "query", "key")]
    outputs = run(found.graph, GIVEN)
    given = {plain.graph.inputs[key]: value for key, value in GIVEN.items()}
    for attention in plain.attentions:
        for kind in ("query", "key"):
            wanted = plain.graph.evaluate(getattr(attention, kind), given).float()
            value = outputs[f"{kind}_{attention.layer}"]
            torch.testing.assert_close(value, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
        assert outputs[f"hidden_{attention.layer}"].shape == (2, 13, 64)


def test_sinks_are_tapped_where_a_layer_has_them():
    found = find(family_model("gpt_oss"), Progress(quiet=True))
    tap_only(found.graph, found.ropes)
    tap_inputs(found.graph, found.ropes)
    outputs = run(found.graph, GIVEN)
    layers = [rope.attention.layer for rope in found.ropes]
    assert layers == [1, 2]
    assert all(outputs[f"sinks_{layer}"].shape == (4,) for layer in layers)


def test_latent_attention_has_no_taps():
    found = find(family_model("deepseek_v2"), Progress(quiet=True))
    tap_only(found.graph, found.ropes)
    tap_inputs(found.graph, found.ropes)
    assert list(found.graph.outputs) == ["query_pre_0", "query_pre_1", "query_pre_2"]
