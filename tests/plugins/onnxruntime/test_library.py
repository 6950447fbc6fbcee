"""The custom-op library itself: how it is built and found, and what it says of a runtime or input that is wrong."""

import ctypes
import os
import subprocess
import tomllib
from pathlib import Path

import onnxruntime as ort
import pytest
from onnx import TensorProto, ValueInfoProto, helper

from keysieve.errors import ExportError
from keysieve.plugins.contract import ATTEND, DOMAIN, LINEAR, MATMUL, SCORE, SELECT, UPDATE, PluginNode, Port
from keysieve.plugins.onnxruntime import build
from keysieve.plugins.onnxruntime.build import PATTERN, SOURCES, build_library, find_library
from support.library import library_session


@pytest.fixture(scope="module")
def library():
    loaded = ctypes.CDLL(str(find_library()))
    loaded.keysieve_instructions.restype = ctypes.c_char_p
    return loaded


def test_it_needs_nothing_of_onnxruntime() -> None:
    needed = subprocess.run(["ldd", str(find_library())], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime" not in needed


def test_what_pip_installs_is_what_plugin_build_makes() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    assert {Path(source).name for source in extension["sources"]} == {file.name for file in SOURCES.glob("*.cpp")}
    assert set(extension["extra-compile-args"]) <= set(build.FLAGS)
    assert extension["optional"] and Path(f"{extension['name'].rpartition('.')[2]}.so").match(PATTERN)


def test_the_newest_library_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert find_library() is None
    for age, name in ((20, "_library.so"), (10, "_library.cpython-311.so"), (0, "other.so")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert find_library() == tmp_path / "_library.cpython-311.so"


def test_a_compiler_that_fails_or_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "library.so"
    with pytest.raises(ExportError, match="building the plugin library failed"):
        build_library(output, compiler="false")
    with pytest.raises(ExportError, match="does not run"):
        build_library(output, compiler=str(tmp_path / "no-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="no C\\+\\+ compiler on PATH"):
        build_library(output)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_is_built_from_its_sources(tmp_path: Path) -> None:
    output = build_library(tmp_path / "new" / "library.so")
    ort.SessionOptions().register_custom_ops_library(str(output))


def test_instruction_sets(library) -> None:
    before = library.keysieve_instructions()
    assert not library.keysieve_use(b"avx1024") and library.keysieve_instructions() == before
    assert library.keysieve_use(b"portable") and library.keysieve_instructions() == b"portable"
    assert library.keysieve_use(before) and library.keysieve_instructions() == before


def test_a_runtime_that_is_too_old_is_named(library) -> None:
    """A stand-in for ONNX Runtime whose newest API is the first one."""
    said = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, message: said.append(message.decode()) or 1
    )
    functions = (ctypes.c_void_p * 300)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(functions) if version == 1 else None
    )
    name = ctypes.create_string_buffer(b"1.2.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(name))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, base)
    assert said == ["keysieve's ops need API version 18 of ONNX Runtime (release 1.18); this is ONNX Runtime 1.2.3"]


@pytest.mark.parametrize("node", [UPDATE, SCORE, SELECT, ATTEND, LINEAR, MATMUL], ids=lambda node: node.name)
def test_a_node_of_another_version_is_refused(node: PluginNode) -> None:
    types = {"cache": "FLOAT", "float32": "FLOAT", "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}

    def info(port: Port) -> ValueInfoProto:
        return helper.make_tensor_value_info(port.name, getattr(TensorProto, types[port.dtype]), None)

    def made_for(version: str) -> ort.InferenceSession:
        names = [[port.name for port in ports] for ports in (node.inputs, node.outputs)]
        one = helper.make_node(node.name, *names, domain=DOMAIN, plugin_version=version)
        return library_session([one], [info(port) for port in node.inputs], [info(port) for port in node.outputs])

    with pytest.raises(Exception, match=f"{node.name}: the file has version 0 of this op, the library version"):
        made_for("0")
    with pytest.raises(Exception, match=r"(?i)attribute"):
        made_for(node.version)  # and of this one only what it lacks
