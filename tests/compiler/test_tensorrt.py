"""compile for TensorRT: what the bundle gets, and what is refused before any work."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keysieve.compiler import compile as compile_module
from keysieve.compiler import tensorrt as module
from keysieve.compiler.bundle import open_bundle
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig, TensorRTConfig
from keysieve.compiler.engine import load
from keysieve.compiler.inspect import inspect
from keysieve.compiler.model import load_skeleton
from keysieve.compiler.pipeline import engine_graph, find
from keysieve.compiler.progress import Progress
from keysieve.compiler.tensorrt import check_tensorrt, kernel_configuration
from keysieve.errors import ConfigError, ExportError, KeySieveError
from keysieve.export.tensorrt import LIBRARY, check_library
from keysieve.kernels.triton import aot
from keysieve.plugins.tensorrt import build
from keysieve.plugins.tensorrt.configuration import read_configuration
from support.bundles import tiny_bundle, tiny_folder
from support.families import WINDOW, family_model
from support.graphs import SideBySide, evicting
from support.tiny_models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

ONLINE = PolicyConfig("triattention", centres="online")
SMALL = EvictionConfig(ONLINE, budget=48, interval=16, sinks=2, recent=8)
QUIET = Progress(quiet=True)


def config(target: str = "tensorrt-rtx", dtype: str = "float16", **options: Any) -> CompileConfig:
    return CompileConfig(SMALL, dtype, target=target, tensorrt=TensorRTConfig(**{"chunk": 32, **options}))


@pytest.mark.slow
def test_a_bundle_with_a_plan(root: Path, tmp_path: Path) -> None:
    compile(tiny_folder("llama", root), tmp_path / "bundle", config(architectures=(86,), aliased=True), QUIET)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest["target"] == "tensorrt-rtx"
    entry = bundle.manifest["tensorrt"]
    assert entry["limits"] == {"batch": 8, "capacity": 80, "chunk": 32, "typical": None, "windows": []}
    assert entry["aliased"] is True
    (plan,) = entry["plans"]
    assert (plan["file"], plan["architecture"], plan["plugin_layers"]) == ("model.sm86.plan", 86, 10)
    assert plan["fused_attention_layers"] == 6 and plan["cache_copies"]["decode"] == []
    assert plan["bytes"] == (bundle.path / plan["file"]).stat().st_size
    assert {plan["file"], "model.sm86.log", LIBRARY, "model.tensorrt.onnx"} <= set(bundle.manifest["files"])
    described = check_library(bundle.path / LIBRARY, [86, 90])
    assert (described["cubins"], described["ptx"], described["aliased"]) == ([80, 86], [80], True)
    assert inspect(bundle.path).plans == entry["plans"]
    # the same bundle runs on ONNX Runtime
    assert len(load(bundle.path).generate([5, 6, 7], max_new_tokens=4, stop_tokens=[])[0].tokens) == 4


@pytest.mark.slow
def test_a_plan_of_a_model_with_windows_and_softcap(tmp_path: Path) -> None:
    model = save_model(family_model("gemma2"), tmp_path / "model")
    compile(model, tmp_path / "bundle", config(architectures=(86,)), QUIET)
    entry = open_bundle(tmp_path / "bundle").manifest["tensorrt"]
    assert entry["limits"]["windows"] == [WINDOW - 1 + 32]
    (plan,) = entry["plans"]
    assert plan["plugin_layers"] == 2 * (3 + 2), "in both profiles: an update a layer, score and select"
    assert len(load(tmp_path / "bundle").generate([5] * 90, max_new_tokens=4, stop_tokens=[])[0].tokens) == 4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mistral, windows", "no layer of the model evicts"),
        ("mixed heads", "different KV heads or head sizes"),
        ("qwen3_next", "layers of linear attention or state space"),
    ],
)
def test_what_the_plugin_has_no_kernels_for(name: str, reason: str) -> None:
    matched = find(family_model("ministral" if name == "mixed heads" else name), QUIET)
    graph = engine_graph(matched, SMALL, None).graph
    if name == "mixed heads":
        value = graph.inputs["key_0"].meta["val"]
        graph.inputs["key_0"].meta["val"] = value.new_empty(value.shape[0], 1, *value.shape[2:])
    with pytest.raises(ConfigError, match=reason):
        kernel_configuration(graph, "float16")


def test_layers_that_evict_have_one_shape() -> None:
    graph = evicting(SideBySide(2, 4), "streaming", "union")
    with pytest.raises(ConfigError, match="layers that evict have 2 shapes"):
        kernel_configuration(graph, "float32")


def test_a_bundle_with_a_kit(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    compile(tiny_folder("llama", root), tmp_path / "bundle", config("tensorrt", architectures=(90,)), QUIET)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest["target"] == "tensorrt" and bundle.manifest["tensorrt"]["plans"] == []
    assert {"build_tensorrt_plan.sh", "build_tensorrt_plan.py", LIBRARY} <= set(bundle.manifest["files"])
    assert check_library(bundle.path / LIBRARY, [90])["cubins"] == [80, 90]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "eviction"),
    [
        ("gpt_neox", replace(SMALL, scope="union")),
        ("cohere", replace(SMALL, policy=replace(ONLINE, aggregation="max", offset_max=8), scope="per_head")),
        ("cohere", replace(SMALL, policy=PolicyConfig("key-norm"), sinks=0)),
        ("llama", replace(SMALL, policy=PolicyConfig("streaming"))),
    ],
)
def test_the_configuration_is_that_of_the_onnx_file(name: str, eviction: EvictionConfig, root: Path) -> None:
    matched = find(load_skeleton(tiny_folder(name, root), "float32"), QUIET)
    found = kernel_configuration(engine_graph(matched, eviction, None).graph, "float32")
    assert found == read_configuration(tiny_bundle(name, eviction, root) / "model.onnx")


# -- what is refused before any work -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"architectures": (70,)}, ConfigError, "GPU architecture 70 is older than 80"),
        ({"architectures": (90,)}, ExportError, "builds for SM 75, 80.* not 90; for others use target tensorrt"),
        ({"capacity": 63}, ConfigError, "capacity 63 is less than the 64 rows of budget 48 and interval 16"),
        ({"capacity": 70_000}, ExportError, "beyond the 65,536 rows"),
        ({"capacity": 100, "chunk": 128}, ExportError, "chunk 128 is more than capacity 100"),
    ],
)
def test_limits_and_architectures(
    options: dict[str, Any], error: type[KeySieveError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "load_model", lambda *arguments: pytest.fail("work has begun"))
    with pytest.raises(error, match=message):
        compile("no-model", tmp_path / "bundle", config(**options), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        with pytest.raises(ConfigError, match="needs Triton"):
            check_tensorrt(config())
    with monkeypatch.context() as patch:
        patch.setattr(build.shutil, "which", lambda name: None)
        with pytest.raises(ExportError, match=r"no C\+\+ compiler on PATH"):
            check_tensorrt(config())


def test_a_head_size_that_no_kernel_takes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known once the model is captured, and said before the export."""
    folder = tmp_path / "model"
    subprocess.run(["cp", "-r", str(tiny_folder("llama", root)), str(folder)], check=True)
    changed = json.loads((folder / "config.json").read_text()) | {"head_dim": 12}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="head_dim is 12; the GPU kernels take multiples of 8"):
        compile(folder, tmp_path / "bundle", config(), QUIET, dry_run=True)


@pytest.mark.parametrize(
    ("architecture", "built"), [(80, 80), (86, 86), (87, 86), (90, 90), (103, 100), (110, 80), (121, 120)]
)
def test_machine_code_is_shared_within_a_generation(architecture: int, built: int) -> None:
    assert aot.machine_code_for(architecture) == built
