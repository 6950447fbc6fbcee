import resource

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from keysieve.compiler.capture import capture
from keysieve.compiler.model import load_skeleton
from keysieve.compiler.pipeline import find
from keysieve.compiler.progress import Progress
from keysieve.errors import CaptureError
from support.graphs import matched, run
from support.tiny_models import save_tiny, tiny_model

QUIET = Progress(quiet=True)


def logits_of(name, tokens, positions):
    with torch.no_grad():
        return tiny_model(name)(input_ids=tokens, position_ids=positions, use_cache=False).logits


def operations(graph):
    """Every node with its operation, arguments and shape."""
    return [(n.name, str(n.target), str(n.args), str(getattr(n.meta.get("val"), "shape", ""))) for n in graph.fx.nodes]


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    graph = capture(model)
    assert model.config._attn_implementation == before != "keysieve", "the model's own implementation is put back"
    return graph


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 5), (4, 17), (3, 130)])
def test_captured_graph_is_the_model_at_every_size(shape, llama):
    tokens = torch.randint(3, 300, shape)
    start = torch.arange(shape[0])[:, None] * 1000
    positions = torch.arange(shape[1]).expand(shape) + start
    out = run(llama, {"input_ids": tokens, "position_ids": positions})
    torch.testing.assert_close(out["logits"], logits_of("llama", tokens, positions), rtol=1e-5, atol=2e-5)


def test_graph_has_two_inputs_and_one_attention_node_a_layer(llama):
    assert list(llama.inputs) == ["input_ids", "position_ids"] and list(llama.outputs) == ["logits"]
    nodes = llama.calls(torch.ops.keysieve.attention.default)
    assert [node.args[-1] for node in nodes] == [0, 1, 2]
    assert all(str(size).startswith("s") for size in llama.shape(llama.inputs["input_ids"]))
    leftovers = {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten.detach_.default,
        torch.ops.aten.detach.default,
    }
    assert not [node for node in llama.fx.nodes if node.target in leftovers]


# -- attention that does not go through transformers' interface ---------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_other_implementations_lower_to_the_same(name, implementation):
    native = matched(name)
    found = find(tiny_model(name), QUIET, implementation)
    assert not found.misses and found.layers == native.layers
    for ours, theirs in zip(found.ropes, native.ropes, strict=True):
        assert (ours.form.kind, ours.form.rotary_dim) == (theirs.form.kind, theirs.form.rotary_dim)
        np.testing.assert_array_equal(ours.form.inv_freq, theirs.form.inv_freq)
        for what in ("layer", "query_heads", "kv_heads", "head_dim", "value_dim", "window", "softcap", "sinks"):
            assert getattr(ours.attention, what) == getattr(theirs.attention, what)
        assert ours.attention.scale == pytest.approx(theirs.attention.scale, rel=1e-12)
    tokens, positions = torch.randint(3, 300, (2, 11)), torch.arange(11).repeat(2, 1)
    out = run(found.graph, {"input_ids": tokens, "position_ids": positions})
    torch.testing.assert_close(out["logits"], logits_of(name, tokens, positions), rtol=1e-5, atol=2e-5)


def test_masks_of_a_models_own_are_made_without_vmap(monkeypatch):
    """transformers makes them with vmap where a model adds a function of its own, as Falcon did."""
    make, before = modeling_llama.create_causal_mask, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    own = {"and_mask_function": lambda *indices: torch.tensor(True)}
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **options: make(**options, **own))
    found = find(tiny_model("llama"), QUIET, "sdpa")
    assert not found.misses and found.layers == 3
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before


def test_unknown_implementation_is_an_error():
    with pytest.raises(CaptureError, match="LlamaForCausalLM: no attention implementation could be captured: flush: "):
        capture(tiny_model("llama"), "flush")


def test_a_model_that_cannot_be_exported_is_an_error_with_the_exporters_words():
    model = tiny_model("llama")
    rotary = model.model.rotary_emb

    def branch_on_data(x, position_ids):
        return (x, x) if position_ids.max() > 3 else (x * 2, x)

    rotary.forward = branch_on_data
    before = model.config._attn_implementation
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM could not be captured by torch\.export: \S+") as caught:
        capture(model)
    assert caught.value.__cause__ is not None and model.config._attn_implementation == before


# -- without weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "smollm3"])
def test_skeleton_gives_the_same_graph(name, tmp_path):
    real, skeleton = matched(name), find(load_skeleton(save_tiny(name, tmp_path)), QUIET)
    assert [str(rope.form) for rope in skeleton.ropes] == [str(rope.form) for rope in real.ropes]
    for ours, theirs in zip(skeleton.ropes, real.ropes, strict=True):
        np.testing.assert_array_equal(ours.form.inv_freq, theirs.form.inv_freq)
    if name == "llama":
        fresh = find(tiny_model(name), QUIET)
        assert operations(skeleton.graph) == operations(fresh.graph)


@pytest.mark.slow
def test_skeleton_of_a_large_model_takes_no_memory(tmp_path):
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_skeleton(tmp_path)
    found = find(model, QUIET)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    elements = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    assert elements > 1e9 and stored < 1000 and grown < 500, f"{grown:.0f} MB for {elements:,} parameters"
    assert [rope.form.head_dim for rope in found.require_all()] == [128, 128]
