"""The torch-tensorrt converters on stand-ins for torch-tensorrt and TensorRT, which do not import without a GPU."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from keysieve.errors import ExportError
from keysieve.export.torch_tensorrt import plugin, register_converters
from keysieve.plugins.contract import NODES, SCORE


class Layer:
    num_outputs = 1

    def get_output(self, index: int) -> str:
        return f"output {index}"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins in place of both packages: what is registered, and what reaches TensorRT."""
    record: dict[str, Any] = {"converters": {}, "plugins": [], "known": {node.name for node in NODES}}

    def converter(operator: Any, supports_dynamic_shapes: bool) -> Any:
        assert supports_dynamic_shapes
        return lambda function: record["converters"].setdefault(operator, function)

    def create_plugin(name: str, fields: list[tuple[str, Any, str]], phase: str) -> tuple[str, dict[str, Any]]:
        record["plugins"].append((name, {key: value for key, value, _ in fields}))
        return name, {key: kind for key, _, kind in fields}

    creator = SimpleNamespace(create_plugin=create_plugin)
    registry = SimpleNamespace(get_creator=lambda name, *_: creator if name in record["known"] else None)
    modules = {
        "torch_tensorrt": {},
        "torch_tensorrt.dynamo": {},
        "torch_tensorrt.dynamo.conversion": {"dynamo_tensorrt_converter": converter},
        "torch_tensorrt.dynamo.conversion.converter_utils": {"get_trt_tensor": lambda context, tensor, name: tensor},
        "tensorrt": {
            "get_plugin_registry": lambda: registry,
            "PluginField": lambda *parts: parts,
            "PluginFieldType": SimpleNamespace(CHAR="char", INT32="int32"),
            "PluginFieldCollection": lambda fields: fields,
            "TensorRTPhase": SimpleNamespace(BUILD="build"),
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return record


def test_score_reaches_tensorrt_with_its_inputs_and_attributes(made: dict[str, Any]) -> None:
    register_converters()
    ops = torch.ops.keysieve
    assert set(made["converters"]) == {ops.update.default, ops.score.default, ops.select.default}
    layers: list[tuple[list[str], list[str], Any]] = []

    def add_plugin_v3(inputs: list[str], shapes: list[str], built: Any) -> Layer:
        layers.append((inputs, shapes, built))
        return Layer()

    context = SimpleNamespace(net=SimpleNamespace(add_plugin_v3=add_plugin_v3))
    arguments = ("length", "limit", "position", "centre", "weight", ["key_0", "key_1"], "trig", 4, 16, 1)
    result = made["converters"][ops.score.default](context, ops.score.default, arguments, {}, "scores")
    assert result == "output 0"
    ((inputs, shapes, (name, kinds)),) = layers
    assert inputs == ["length", "limit", "position", "centre", "weight", "key_0", "key_1"] and shapes == []
    ((_, values),) = made["plugins"]
    assert name == "scores" and list(values) == list(SCORE.attributes)
    assert values["policy"] == b"trig" and [int(values[key][0]) for key in list(values)[1:]] == [4, 16, 1]
    assert kinds == {"policy": "char", "query_heads": "int32", "rotary_dim": "int32", "interleaved": "int32"}


def test_a_library_that_is_not_loaded(made: dict[str, Any]) -> None:
    made["known"].clear()
    with pytest.raises(ExportError, match="TensorRT knows no plugin KeySieveScore 1; load the plugin library"):
        plugin(SCORE, "scores", {"policy": "trig"})


def test_without_torch_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(ExportError, match="torch-tensorrt cannot be imported"):
        register_converters()
