"""The built library: what it needs and holds, and that TensorRT-RTX and TensorRT's lean runtime take its plugins."""

import ctypes
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from keysieve.errors import ExportError
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.plugins.contract import NODES
from keysieve.plugins.tensorrt.build import build_library

# Registers the library in the module named first, and creates each plugin from its fields in both phases.
REGISTER = """
import importlib, sys
import numpy as np
trt = importlib.import_module(sys.argv[1])
logger = trt.Logger()
builder = trt.Builder(logger) if hasattr(trt, "Builder") else None  # it owns its registry
registry = builder.get_plugin_registry() if builder else trt.get_plugin_registry()
registry.load_library(sys.argv[2])
def number(name, value): return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)
def text(name, value): return trt.PluginField(name, value.encode(), trt.PluginFieldType.CHAR)
fields = {
    "KeySieveUpdate": [number("layer", 2)],
    "KeySieveScore": [
        text("policy", "trig"), number("query_heads", 4), number("rotary_dim", 16), number("interleaved", 0)],
    "KeySieveSelect": [
        text("scope", "per_layer_per_head"), number("kv_heads", 2), number("sinks", 2), number("recent", 8)],
}
for name, values in fields.items():
    version = "2" if name == "KeySieveSelect" else "1"
    creator = registry.get_creator(name, version, "")
    print(name, *(f"{field.name}:{field.type.name}" for field in creator.field_names))
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        plugin = creator.create_plugin("layer", trt.PluginFieldCollection(values), phase)
        build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (name, version, ""), name
        assert type(build).__name__ == "IPluginV3OneBuildV2", type(build)
    print(name, "outputs", build.num_outputs)
assert registry.get_creator("KeySieveUpdate", "1", "").create_plugin(
    "layer", trt.PluginFieldCollection([text("layer", "2")]), trt.TensorRTPhase.BUILD) is None
del plugin, build, core, creator, registry  # before the builder, which unloads the library
"""


def test_description_is_the_configuration(library: Path, model: KernelConfiguration) -> None:
    loaded = ctypes.CDLL(str(library))
    loaded.keysieve_description.restype = ctypes.c_char_p
    described = json.loads(loaded.keysieve_description())
    assert described["configuration"] == asdict(model)
    assert described["nodes"] == {node.name: node.version for node in NODES}
    assert (described["cubins"], described["ptx"], described["exact"], described["aliased"]) == ([80], [80], [], False)


def test_library_needs_only_libc(library: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)[.-](?:so|linux)", dynamic))
    assert needed <= {"libc", "libm", "libdl", "libpthread", "ld"}
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == {"getCreators", "setLoggerFinder", "keysieve_description", "keysieve_last_error"}


def test_same_bytes_twice(library: Path, model: KernelConfiguration, tmp_path: Path) -> None:
    from keysieve.kernels.triton.aot import build

    again = build_library(model, build(model, (80,)), tmp_path / "again.so", cache=tmp_path / "cache")
    assert again.read_bytes() == library.read_bytes()


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt_lean"])
def test_tensorrt_creates_the_plugins(module: str, library: Path) -> None:
    # A process of its own: both modules in one do not get on.
    command = [sys.executable, "-c", REGISTER, module, str(library)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    expected = []
    for node in NODES:
        types = [f"{name}:{'CHAR' if kind is str else 'INT32'}" for name, kind in node.attributes.items()]
        expected += [f"{node.name} {' '.join(types)} plugin_version:CHAR"]
        expected += [f"{node.name} outputs {len(node.outputs)}"]
    assert result.stdout.splitlines() == expected
    assert "attribute layer must be one int32" in result.stderr


def test_missing_kernels_are_named(model: KernelConfiguration, tmp_path: Path) -> None:
    from keysieve.kernels.triton.aot import build

    some = [artifact for artifact in build(model, (80,)) if artifact.name != "select_plan"]
    with pytest.raises(ExportError, match="no kernel select_plan for sm_80"):
        build_library(model, some, tmp_path / "x.so")
    with pytest.raises(ExportError, match="no kernels given"):
        build_library(model, [], tmp_path / "x.so")
    changed = [replace(artifact, parameters=artifact.parameters[1:]) for artifact in build(model, (80,))]
    with pytest.raises(ExportError, match="has parameters"):
        build_library(model, changed, tmp_path / "x.so")


def test_missing_compiler_is_named(model: KernelConfiguration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keysieve.kernels.triton.aot import build

    artifacts = build(model, (80,))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"no C\+\+ compiler on PATH"):
        build_library(model, artifacts, tmp_path / "x.so")
    with pytest.raises(ExportError, match="does not run"):
        build_library(model, artifacts, tmp_path / "x.so", compiler="no-such-compiler")


def test_wrong_header_folder_is_named(model: KernelConfiguration, tmp_path: Path) -> None:
    from keysieve.kernels.triton.aot import build

    with pytest.raises(ExportError, match=r"has no NvInferRuntime\.h"):
        build_library(model, build(model, (80,)), tmp_path / "x.so", tensorrt_include=tmp_path)
