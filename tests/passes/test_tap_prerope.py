"""The taps are the queries that hooks on the model see before RoPE, for every tiny model."""

import numpy as np
import pytest
import torch

from keysieve.passes.tap_prerope import tap_only, tap_prerope
from support.graphs import match, matched, run
from support.layer_rope import layer_ropes
from support.masked_forward import forward
from support.tiny_models import DECODERS, tiny_model

TOKENS = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.stack([torch.arange(13), torch.arange(90, 103)])


def hooked_queries(model):
    """Pre-RoPE queries [B,Hq,S,D] of every layer, by forward hooks on the last module before RoPE."""
    heads, seen = model.config.num_attention_heads, []

    def keep(module, inputs, output):
        if "query_key_value" in names[module]:  # GPT-NeoX: heads of (query, key, value)
            output = output.unflatten(-1, (heads, -1)).chunk(3, -1)[0]
        elif output.dim() == 3:
            output = output.unflatten(-1, (heads, -1))
        seen.append(output.transpose(1, 2))

    names = {module: name for name, module in model.named_modules()}
    for ending in ("q_norm", "q_proj", "query_key_value"):
        chosen = [module for module, name in names.items() if name.endswith(ending)]
        if chosen:
            break
    handles = [module.register_forward_hook(keep) for module in chosen]
    with torch.no_grad():
        model(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", DECODERS)
def test_taps_are_the_queries_before_rope(name):
    found = matched(name)
    graph = found.graph
    taps = tap_prerope(graph, found.ropes)
    expected = hooked_queries(tiny_model(name).double())
    given = {graph.inputs["input_ids"]: TOKENS, graph.inputs["position_ids"]: POSITIONS}
    assert len(taps) == len(expected) == tiny_model(name).config.num_hidden_layers
    for tap, wanted in zip(taps, expected, strict=True):
        value = graph.evaluate(tap, given)
        assert value.shape == wanted.shape
        # The hooked model is float64, but its norms and angles are float32 by its own code.
        torch.testing.assert_close(value, wanted, rtol=0, atol=4e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox"])
def test_tapped_graph_gives_only_the_taps(name):
    """As calibration runs it, in float32, against the masked reference, which undoes the rotation."""
    found = match(name)
    nodes = len(found.graph.fx.nodes)
    tap_only(found.graph, found.ropes)
    assert list(found.graph.outputs) == ["query_pre_0", "query_pre_1", "query_pre_2"]
    taps = run(found.graph, {"input_ids": TOKENS, "position_ids": torch.arange(13).repeat(2, 1)})
    assert len(found.graph.fx.nodes) < nodes, "the last layer's attention and the head are not computed"
    assert not any("lm_head" in str(spec.target) for spec in found.graph.specs.values())
    model = tiny_model(name)
    ropes = layer_ropes(model)
    for b in range(2):
        _, layers = forward(model, TOKENS[b].tolist(), lambda layer, n: np.tri(n, dtype=bool)[None].repeat(4, 0))
        for layer, (rope, (rotated, _)) in enumerate(zip(ropes, layers, strict=True)):
            plain = rope.undo(rotated, np.arange(13))
            np.testing.assert_allclose(taps[f"query_pre_{layer}"][b], plain, rtol=0, atol=1e-5 * np.abs(plain).max())
