"""compile: what a bundle holds, what a dry run does not, and the other dtypes."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from keysieve.compiler import compile as compile_module
from keysieve.compiler import statistics_file
from keysieve.compiler.bundle import open_bundle
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.progress import Progress
from keysieve.errors import CaptureError, EngineError, StatisticsError
from keysieve.version import __version__
from support.bundles import tiny_bundle, tiny_folder, tiny_statistics
from support.tiny_models import EOS, POSITIONS, VOCABULARY, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
STREAMING = replace(SMALL, policy=PolicyConfig("streaming"))
QUIET = Progress(quiet=True)


def unlike(*arguments: Any) -> None:
    pytest.fail("must not be called")


# -- the bundle --------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_compiled(root: Path) -> None:
    manifest = open_bundle(tiny_bundle("llama", SMALL, root)).manifest
    assert manifest["keysieve"] == __version__
    assert (manifest["target"], manifest["dtype"], manifest["inlined"]) == ("onnxruntime", "float32", False)
    assert manifest["sizes"] == {"layers": 3, "query_heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16}
    assert (manifest["vocab_size"], manifest["position_limit"]) == (VOCABULARY, POSITIONS)
    assert manifest["stop_tokens"] == [EOS]
    assert manifest["eviction"] == asdict(SMALL)
    assert manifest["nodes"] == {"KeySieveUpdate": 3, "KeySieveScore": 1, "KeySieveSelect": 1}
    assert manifest["plans"] == {"plan": {"layers": 3, "kv_heads": 2, "class": 0}} and manifest["windows"] == []
    cache = {"heads": [0, 1], "kv_heads": 2, "head_dim": 16, "value_dim": 16, "class": 0, "window": None}
    assert manifest["caches"] == [{"name": str(layer), "layer": layer, **cache} for layer in range(3)]
    assert manifest["classes"] == [{"suffix": "", "kv_heads": 6, "budgets": [1], "shares": [1.0]}]
    assert [layer["layer"] for layer in manifest["layers"]] == [0, 1, 2]
    assert all(layer["matched"] and layer["rope_form"] == "half_split" for layer in manifest["layers"])
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert set(manifest["versions"]) == {"torch", "transformers", "onnx", "onnxruntime"}


def test_the_bundle_ties_statistics_to_the_model(root: Path) -> None:
    bundle = open_bundle(tiny_bundle("llama", SMALL, root))
    inside = statistics_file.load(bundle.path / "stats.safetensors")
    given = statistics_file.load(tiny_statistics("llama", root))
    assert inside.model == given.model == bundle.manifest["model"]
    np.testing.assert_array_equal(inside.layers[2].q_mean, given.layers[2].q_mean)


def test_the_graph_carries_its_own_description(root: Path) -> None:
    model = onnx.load(tiny_bundle("llama", SMALL, root) / "model.onnx", load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["keysieve"], metadata["architecture"]) == (__version__, "LlamaForCausalLM")
    assert json.loads(metadata["eviction"]) == asdict(SMALL)
    assert sum(node.op_type == "KeySieveUpdate" for node in model.graph.node) == 3


def test_every_file_may_be_read_by_all(root: Path) -> None:
    online = replace(SMALL, policy=PolicyConfig("triattention", centres="online"))
    files = [file for file in tiny_bundle("llama", online, root).iterdir() if file.is_file()]
    assert "state.safetensors" in {file.name for file in files}
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


# -- dry run and graph dumps -------------------------------------------------------------------------------------------


def test_a_dry_run_reads_no_weights_and_writes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompileConfig(SMALL, stats=tiny_statistics("llama", root))
    monkeypatch.setattr(compile_module, "load_model", unlike)
    report = compile(tiny_folder("llama", root), tmp_path / "bundle", config, QUIET, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.nodes == {"KeySieveUpdate": 3, "KeySieveScore": 1, "KeySieveSelect": 1}
    assert [(layer.layer, layer.matched, layer.rope_form) for layer in report.layers] == [
        (layer, True, "half_split") for layer in range(3)
    ]


def test_a_dry_run_checks_the_statistics(root: Path, tmp_path: Path) -> None:
    config = CompileConfig(SMALL, stats=tiny_statistics("llama", root))
    with pytest.raises(StatisticsError, match="do not belong to this model: config_sha256"):
        compile(tiny_folder("llama_linear", root), tmp_path / "bundle", config, QUIET, dry_run=True)


def test_graphs_are_dumped_before_and_after(root: Path, tmp_path: Path) -> None:
    config = CompileConfig(STREAMING, dump_graphs=tmp_path / "new" / "graphs")
    (tmp_path / "bundle").write_text("precious")  # no reason against a dry run
    compile(tiny_folder("llama_mha", root), tmp_path / "bundle", config, QUIET, dry_run=True)
    assert (tmp_path / "bundle").read_text() == "precious"
    assert sorted(file.name for file in (tmp_path / "new" / "graphs").iterdir()) == ["captured.txt", "rewritten.txt"]
    captured, rewritten = (
        (tmp_path / "new" / "graphs" / name).read_text() for name in ("captured.txt", "rewritten.txt")
    )

    def calls(graph: str, name: str) -> int:
        return len(re.findall(rf"keysieve\.{name}\.default\]", graph))

    names = ("attention", "attend", "update", "score", "select")
    assert [calls(captured, name) for name in names] == [2, 0, 0, 0, 0]
    assert [calls(rewritten, name) for name in names] == [0, 2, 2, 1, 1]


def test_graphs_cannot_be_dumped_into_a_file(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    config = CompileConfig(STREAMING, dump_graphs=tmp_path / "file")
    with pytest.raises(CaptureError, match=r"cannot write graphs to .*file"):
        compile(tiny_folder("llama_mha", root), tmp_path / "bundle", config, QUIET, dry_run=True)
    assert (tmp_path / "file").read_text() == "precious"


# -- other dtypes ------------------------------------------------------------------------------------------------------


def test_a_float16_bundle_runs(root: Path) -> None:
    path = tiny_bundle("llama_mha", SMALL, root, dtype="float16")
    engine = load(path, threads=1)
    prompt = torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0))
    session = engine.session(dense=True, capacity=40)
    assert session._caches["key_0"].array.dtype == np.float16
    logits = session.step(prompt[None].numpy(), np.array([40]), np.arange(40)[None])[0]
    with torch.no_grad():
        wanted = tiny_model("llama_mha")(prompt[None]).logits[0].numpy()
    assert logits.dtype == np.float32
    assert 1e-5 < np.abs(logits - wanted).max() < 0.05
    engine.generate(prompt.tolist(), max_new_tokens=60, stop_tokens=[])
    assert engine.counters is not None
    assert engine.counters.rounds == [3] and engine.counters.rows_held == [51]
    assert engine.counters.kv_bytes == 2 * 2 * 4 * 64 * 16 * 2


def test_a_bfloat16_bundle_compiles_and_says_that_it_cannot_run_here(root: Path) -> None:
    path = tiny_bundle("llama_mha", STREAMING, root, dtype="bfloat16")
    assert open_bundle(path).manifest["dtype"] == "bfloat16"
    with pytest.raises(EngineError, match=r"no kernels for bfloat16; compile with --dtype float32 or float16"):
        load(path)
