"""Real TensorRT-RTX plans of tiny models, built without a GPU, and what is refused before a build starts."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.errors import ConfigError, ExportError
from keysieve.export import tensorrt as export
from keysieve.export.tensorrt import LIBRARY, PARSER_MODEL, Limits, build_rtx_plan, check_library, write_parser_model
from keysieve.export.tensorrt_kit import write_kit
from keysieve.kernels.triton.aot import build
from keysieve.plugins.contract import DOMAIN, NODES
from keysieve.plugins.tensorrt.build import build_library
from keysieve.plugins.tensorrt.configuration import read_configuration
from keysieve.plugins.tensorrt.twin import output_shapes
from support.bundles import tiny_bundle

EVICTION = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
LIMITS = Limits(batch=4, capacity=256, chunk=32)


def half_bundle(
    name: str, root: Path, scope: str = "per_layer_per_head", dtype: str = "float16", policy: str = "triattention"
) -> Path:
    eviction = replace(EVICTION, scope=scope, policy=PolicyConfig(policy))
    return tiny_bundle(name, eviction, root, dtype=dtype)


@pytest.fixture(scope="session")
def prepared(root: Path) -> Callable[..., tuple[Path, Path]]:
    """Parser model and plugin library of a tiny model."""

    def prepare(name: str, aliased: bool = False, **options: str) -> tuple[Path, Path]:
        bundle = half_bundle(name, root, **options)
        folder = root / "tensorrt" / f"{bundle.name}{'-aliased' if aliased else ''}"
        if not folder.exists():
            folder.mkdir(parents=True)
            for file in ("model.onnx", "model.onnx.data"):
                (folder / file).hardlink_to(bundle / file)
            configuration = read_configuration(folder / "model.onnx")
            build_library(configuration, build(configuration, (80,)), folder / LIBRARY, aliased)
            write_parser_model(folder / "model.onnx")
        return folder / PARSER_MODEL, folder / LIBRARY

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"aliased": True}),
        ("qwen3", {}),
        ("gpt_neox", {"scope": "per_head"}),
        ("cohere", {"scope": "union"}),
        ("llama", {"dtype": "bfloat16", "policy": "key-norm"}),
        ("llama", {"dtype": "float32"}),
    ],
)
def test_tiny_plan(name: str, options: dict, prepared: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    model, library = prepared(name, **options)
    layers = sum(n.op_type == "KeySieveUpdate" for n in onnx.load(model, load_external_data=False).graph.node)
    steps: list[str] = []
    plan = build_rtx_plan(
        model, library, tmp_path / "m.plan", 86, LIMITS, lambda phase, done, total: steps.append(phase)
    )
    content = plan.path.read_bytes()
    for node in NODES:
        assert node.name.encode() in content
    assert library.read_bytes()[:4096] in content  # the library goes along
    profiles = len(LIMITS.profiles())
    assert len(plan.plugins) == profiles * (layers + 2)
    # Every Attention became one fused kernel; for prefills in float32 TensorRT has none.
    assert len(plan.attention) == layers * (1 if options.get("dtype") == "float32" else profiles)
    assert plan.cache_copies["decode"] == []
    assert len(plan.cache_copies["prefill"]) <= 2 * layers  # TensorRT's attention of many tokens repeats KV heads
    assert steps
    log = plan.path.with_suffix(".log").read_text()
    for layer in range(layers):
        assert re.search(rf"Name: KeySieveUpdate\.{layer}\S*, LayerType: (PluginV3|custom_layer)", log)


def test_shapes_are_those_of_the_twin(prepared: Callable[..., tuple[Path, Path]]) -> None:
    """Every plugin's output shapes: the twin's, the C++ library's as TensorRT infers them, and the ONNX file's."""
    model, library = prepared("llama")
    trt = export.import_rtx()
    logger = trt.Logger()
    builder = trt.Builder(logger)
    builder.get_plugin_registry().load_library(str(library))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(model))
    inferred = {layer.name: layer for layer in map(network.get_layer, range(network.num_layers))}
    graph = onnx.load(model, load_external_data=False).graph
    declared = {
        info.name: [size.dim_value or -1 for size in info.type.tensor_type.shape.dim]
        for info in (*graph.input, *graph.value_info, *graph.output)
    }
    nodes = {node.name: node for node in NODES}
    checked = 0
    for node in graph.node:
        if node.domain != DOMAIN:
            continue
        layer = inferred[node.name]
        assert layer.type == trt.LayerType.PLUGIN_V3
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
        inputs = [tuple(layer.get_input(index).shape) for index in range(layer.num_inputs)]
        expected = output_shapes(nodes[node.op_type], inputs, attributes)
        assert [tuple(layer.get_output(index).shape) for index in range(layer.num_outputs)] == expected
        for name, shape in zip(node.output, expected, strict=True):
            if name in declared:
                assert declared[name] == list(shape)
        checked += 1
    assert checked == 5


def test_progress_can_stop_a_build(prepared: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_rtx_plan(*prepared("llama"), tmp_path / "m.plan", 86, LIMITS, stop)
    assert not (tmp_path / "m.plan").exists()


def test_library_is_checked_first(prepared: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    model, library = prepared("llama")
    with pytest.raises(ExportError, match="no plugin library at"):
        build_rtx_plan(model, tmp_path / "none.so", tmp_path / "m.plan", 86, LIMITS)
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ExportError, match="is no plugin library of keysieve"):
        check_library(tmp_path / "text.so", [])
    with pytest.raises(ExportError, match="no PTX that sm_75 can run"):
        build_rtx_plan(model, library, tmp_path / "m.plan", 75, LIMITS)
    with pytest.raises(ExportError, match="builds for SM 75, 80"):
        build_rtx_plan(model, library, tmp_path / "m.plan", 90, LIMITS)


def test_library_of_another_version_is_refused(
    prepared: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, library = prepared("llama")
    monkeypatch.setattr(export, "NODES", [SimpleNamespace(name="KeySieveUpdate", version="2")])
    with pytest.raises(ExportError, match="build it again with `keysieve plugin build`"):
        check_library(library, [])


@pytest.mark.slow
def test_library_of_another_model_is_refused(prepared: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """TensorRT's failure carries the plugin's own message."""
    with pytest.raises(ExportError, match=r"KeySieveUpdate.*build the plugin library from the same bundle"):
        build_rtx_plan(prepared("qwen3")[0], prepared("llama")[1], tmp_path / "m.plan", 86, LIMITS)
    assert (tmp_path / "m.log").is_file()


@pytest.mark.parametrize("change", [{"batch": 0}, {"capacity": 65537}, {"chunk": 9999}, {"typical": 5000}])
def test_limits_are_checked(change: dict[str, int]) -> None:
    with pytest.raises(ExportError):
        Limits(**change)


def test_missing_tensorrt_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="TensorRT-RTX is not installed"):
        export.import_rtx()
    with pytest.raises(ExportError, match="ordinary TensorRT is not installed"):
        export.build_tensorrt_plan(tmp_path, tmp_path, tmp_path, LIMITS)


def test_parser_link_that_cannot_be_made_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    def refuse(self: Path, target: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "tensorrt_rtx_libs", SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(export, "find_spec", lambda name: object())
    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(ExportError, match=r"ln -s libtensorrt_rtx\.so\.1"):
        export.import_rtx()


def test_unsuitable_models_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match=r"text.onnx"):
        read_configuration(tmp_path / "text.onnx")
    with pytest.raises(ExportError, match="cannot be read"):
        read_configuration(tmp_path / "missing.onnx")
    proto = onnx.load(half_bundle("llama", root) / "model.onnx", load_external_data=False)
    kept = [node for node in proto.graph.node if node.op_type != "KeySieveScore"]
    full = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    onnx.save(proto, tmp_path / "inlined.onnx")
    with pytest.raises(ExportError, match="has no KeySieveScore node"):
        read_configuration(tmp_path / "inlined.onnx")
    del proto.graph.node[:]
    proto.graph.node.extend(full)
    for value in proto.graph.input:
        if value.name.startswith("key_"):
            value.type.tensor_type.shape.dim[3].dim_value = 20
    onnx.save(proto, tmp_path / "odd.onnx")
    with pytest.raises(ConfigError, match="multiples of 8"):
        read_configuration(tmp_path / "odd.onnx")


def test_kit_builds_elsewhere(root: Path, tmp_path: Path) -> None:
    shutil.copy(half_bundle("llama", root) / "model.onnx", tmp_path)
    model = write_parser_model(tmp_path / "model.onnx")
    shell, script = write_kit(model, model.with_name(LIBRARY), LIMITS)
    line = shell.read_text()
    assert "--preview=+aliasedPluginIO1003" in line and f"--setPluginsToSerialize=./{LIBRARY}" in line
    assert "--profile=0" in line and "key_2:1x2x128x16" in line and "input_ids:4x32" in line
    compile(script.read_text(), str(script), "exec")
    assert f"'input_ids': {[(1, 1), (1, 1), (4, 1)]!r}" in script.read_text()
