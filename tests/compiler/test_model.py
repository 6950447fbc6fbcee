import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from keysieve.compiler.model import identity, load_model, load_skeleton, load_tokenizer
from keysieve.errors import CaptureError
from support.tiny_models import save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_come_in_the_dtype_asked_for(dtype, folder):
    model = load_model(folder, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "RoPE tables keep their precision"
    assert not model.training
    expected = dict(tiny_model("llama").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype))


@pytest.mark.parametrize("load", [load_model, load_skeleton, load_tokenizer])
def test_what_cannot_be_loaded_is_an_error_that_names_it(load, tmp_path):
    with pytest.raises(CaptureError, match=r"folder .* has no config.json"):
        load(tmp_path)
    with pytest.raises(CaptureError, match="no such GGUF file"):
        load(tmp_path / "model.gguf")
    with pytest.raises(CaptureError, match=r"cannot load the .* of nobody/nothing: .*MODEL is a hub name") as caught:
        load("nobody/nothing")
    assert caught.value.__cause__ is not None and "\n" not in str(caught.value)


def test_a_model_type_that_is_unknown_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    for load in (load_model, load_skeleton):
        with pytest.raises(CaptureError, match=f"of {tmp_path}: "):
            load(tmp_path)


def test_weights_that_are_missing_or_broken_are_an_error(tmp_path):
    save_tiny("llama", tmp_path, tokenizer=False)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(CaptureError, match="cannot load the weights"):
        load_model(tmp_path)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CaptureError, match="cannot load the weights"):
        load_model(tmp_path)


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    save_tiny("llama", tmp_path, tokenizer=False)
    with pytest.raises(CaptureError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_skeleton_has_shapes_and_tables_but_no_weights(folder):
    skeleton, model = load_skeleton(folder, "float16"), tiny_model("llama")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in skeleton.named_parameters()} == shapes
    for parameter in skeleton.parameters():
        assert parameter.device.type == "cpu" and parameter.dtype == torch.float16
        assert parameter.untyped_storage().nbytes() == 2 and not parameter.requires_grad
    assert torch.equal(skeleton.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not skeleton.training


def test_tied_weights_stay_tied_in_a_skeleton(tmp_path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, tie_word_embeddings=True,
                architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    skeleton = load_skeleton(tmp_path)
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight


def test_making_a_skeleton_leaves_torch_as_it_was(folder, tmp_path):
    register = nn.Module.register_parameter
    load_skeleton(folder)
    assert nn.Module.register_parameter is register
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": -4}))
    with pytest.raises(CaptureError):
        load_skeleton(tmp_path)
    assert nn.Module.register_parameter is register
    assert nn.Linear(2, 2).weight.device.type == "cpu"


# -- identity ----------------------------------------------------------------------------------------------------


def test_identity_is_the_models_and_not_the_loads(folder, tmp_path):
    first = identity(load_model(folder))
    assert set(first) == {"architecture", "config_sha256", "weights_sha256"}
    assert first["architecture"] == "LlamaForCausalLM"
    assert identity(load_model(folder)) == first
    copy = load_model(folder)
    copy.save_pretrained(tmp_path)
    assert identity(load_model(tmp_path)) == first


def test_identity_tells_weights_and_configurations_apart(folder):
    original, changed = identity(load_model(folder)), load_model(folder)
    changed.model.layers[1].mlp.up_proj.weight.data *= 1.01
    assert identity(changed)["weights_sha256"] != original["weights_sha256"]
    assert identity(changed)["config_sha256"] == original["config_sha256"]
    reconfigured = load_model(folder)
    reconfigured.config.rms_norm_eps = 1e-3
    assert identity(reconfigured)["config_sha256"] != original["config_sha256"]
    assert identity(reconfigured)["weights_sha256"] == original["weights_sha256"]
    assert identity(load_skeleton(folder))["config_sha256"] == original["config_sha256"]
    assert identity(tiny_model("llama", seed=1))["weights_sha256"] != original["weights_sha256"]
