"""inspect: one entry a layer, from a configuration alone or from a bundle, and a reason for every miss."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen2Config

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.inspect import Report, find_fast, inspect, report_of
from keysieve.compiler.model import load_skeleton
from keysieve.compiler.pipeline import find
from keysieve.compiler.progress import Progress
from keysieve.errors import BundleError, CaptureError
from support.bundles import tiny_bundle, tiny_folder
from support.families import family_model
from support.tiny_models import VOCABULARY

SMALL = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def llama_report(root: Path) -> Report:
    return inspect(tiny_folder("llama", root), SMALL, progress=QUIET)


def config_only(name: str, root: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(tiny_folder(name, root) / "config.json", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("gpt_neox", ["half_split"] * 3),
        ("cohere", ["interleaved"] * 3),
        ("smollm3", ["half_split", "nope"] * 2),
    ],
)
def test_a_configuration_is_enough(name: str, forms: list[str], root: Path, tmp_path: Path) -> None:
    report = inspect(config_only(name, root, tmp_path / "model"), SMALL, progress=QUIET)
    assert [layer.layer for layer in report.layers] == list(range(len(forms)))
    assert [str(layer.rope_form).split()[0].split("(")[0] for layer in report.layers] == forms
    assert all(layer.matched and layer.kind == "full" and layer.reason is None for layer in report.layers)
    assert len({layer.node for layer in report.layers}) == len(forms)
    kv_heads = 4 if name == "gpt_neox" else 2
    assert report.kv_bytes_per_token == len(forms) * kv_heads * (16 + 16) * 4
    assert (report.budget, report.kv_bytes_for_budget) == (48, report.kv_bytes_per_token * (48 + 16))


@pytest.mark.parametrize("name", ["llama_yarn", "qwen3", "gpt_neox", "cohere", "smollm3", "gpt2"])
def test_fixed_sizes_find_what_the_compiler_finds(name: str, root: Path) -> None:
    """inspect captures with fixed sizes, to be fast; compile with dynamic ones."""
    model = load_skeleton(tiny_folder(name, root))
    assert inspect(tiny_folder(name, root), SMALL) == report_of(model, find(model, QUIET), SMALL, "float32")


@pytest.mark.parametrize(
    ("misses", "window_forms", "captures"),
    [([], {0: "form"}, [True]), (["miss"], {0: "form"}, [True, False]), ([], {}, [True, False])],
)
def test_what_fixed_sizes_do_not_show_is_looked_at_again(
    misses: list, window_forms: dict, captures: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stand_in(model: object, progress: Progress, only_to_find: bool = False) -> SimpleNamespace:
        calls.append(only_to_find)
        return SimpleNamespace(misses=misses, windowed=["attention"], window_forms=window_forms)

    monkeypatch.setattr("keysieve.compiler.inspect.find", stand_in)
    find_fast(None, QUIET)  # type: ignore[arg-type]
    assert calls == captures


def test_a_bundle_reports_what_it_was_compiled_from(root: Path, llama_report: Report) -> None:
    report = inspect(tiny_bundle("llama", SMALL, root))
    model = llama_report
    assert report.layers == model.layers
    assert (report.kv_bytes_per_token, report.kv_bytes_for_budget) == (768, 768 * 64)
    assert (model.kv_bytes_per_token, model.kv_bytes_for_budget) == (768, 768 * 64)
    assert report.architecture == model.architecture == "LlamaForCausalLM"
    assert report.nodes == {"KeySieveUpdate": 3, "KeySieveScore": 1, "KeySieveSelect": 1}
    assert report.eviction["policy"]["name"] == "triattention"
    entry = json.loads(json.dumps(report.to_json()))["layers"][1]
    assert {"layer", "kind", "rope_form", "matched", "reason"} <= set(entry)


def test_a_damaged_bundle_is_refused(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle("llama", SMALL, root), tmp_path / "bundle")
    (copy / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        inspect(copy)


def test_dtype_decides_the_bytes(root: Path, tmp_path: Path) -> None:
    report = inspect(config_only("llama_mha", root, tmp_path / "model"), SMALL, "float16", QUIET)
    assert (report.dtype, report.kv_bytes_per_token) == ("float16", 2 * 4 * 32 * 2)


def test_layers_of_every_kind(tmp_path: Path) -> None:
    """Windows hold their own rows; a miss has layer, node and reason."""
    config = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "sliding_window": 64, "architectures": ["Qwen2ForCausalLM"]}
    kinds = ["sliding_attention", "full_attention"]
    Qwen2Config(**config, num_hidden_layers=2, layer_types=kinds, use_sliding_window=True).save_pretrained(tmp_path)
    report = inspect(tmp_path, SMALL, progress=QUIET)
    assert report.architecture == "Qwen2ForCausalLM"
    found = [(layer.layer, layer.kind, layer.matched, layer.rope_form, layer.window) for layer in report.layers]
    assert found == [(0, "sliding", True, "half_split", 64), (1, "full", True, "half_split", 0)]
    row = 2 * (16 + 16) * 4
    assert report.kv_bytes_per_token == row and report.kv_bytes_for_budget == row * (48 + 16 + 63 + 16)


def test_heads_and_latents_of_every_layer(llama_report: Report, tmp_path: Path) -> None:
    assert [(found.query_heads, found.kv_heads, found.head_dim, found.latent) for found in llama_report.layers] == [
        (4, 2, 16, 0)
    ] * 3
    family_model("deepseek_v3").save_pretrained(tmp_path)
    layers = inspect(tmp_path, SMALL, progress=QUIET).layers
    assert [(found.query_heads, found.kv_heads, found.head_dim, found.latent) for found in layers] == [
        (4, 4, 24, 16)
    ] * 3


def test_every_miss_has_layer_node_and_reason(tmp_path: Path) -> None:
    family_model("phi3, longrope").save_pretrained(tmp_path)
    report = inspect(tmp_path, progress=QUIET)
    kinds = [(layer.layer, layer.kind, layer.matched, layer.rope_form) for layer in report.layers]
    assert kinds == [(layer, "unsupported", False, None) for layer in range(3)]
    for layer in report.layers:
        assert layer.reason is not None and "change with the length, from 1,025 tokens" in layer.reason
        assert layer.node


def test_a_model_without_rope_matches_nothing(root: Path, tmp_path: Path) -> None:
    report = inspect(config_only("gpt2", root, tmp_path / "model"), SMALL, progress=QUIET)
    assert [(layer.kind, layer.rope_form, layer.matched) for layer in report.layers] == [("full", "nope", False)] * 2
    assert all(layer.reason == "no layer of the model has a rotary embedding" for layer in report.layers)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"has no config\.json, so it is not a HuggingFace model"):
        inspect(tmp_path, progress=QUIET)
