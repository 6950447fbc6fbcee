"""The Python twin against the contract; export/test_tensorrt.py compares it with the C++ through TensorRT's parser."""

from dataclasses import replace

from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.plugins.contract import SCORE, SELECT, UPDATE
from keysieve.plugins.tensorrt.twin import aliased_inputs, input_types, output_shapes, output_types, select_workspace

CACHE = ("B", 2, "C", 16)
UPDATE_INPUTS = [("B", 2, "S", 16), ("B", 2, "S", 24), ("B",), (3, "B", 2, "C"), ("B",), CACHE, ("B", 2, "C", 24)]


def test_update_keeps_the_caches() -> None:
    assert output_shapes(UPDATE, UPDATE_INPUTS, {"layer": 1}) == [CACHE, ("B", 2, "C", 24)]
    assert aliased_inputs(UPDATE) == [5, 6]
    assert output_types(UPDATE, "float16") == ["float16", "float16"]


def test_score_takes_layers_from_its_inputs() -> None:
    inputs = [("B",), ("B",), ("B",), (3, "B", 4, 1, 16), (3, "B", 4, 8), CACHE, CACHE, CACHE]
    assert output_shapes(SCORE, inputs, {"query_heads": 4}) == [(3, "B", 4, "C")]
    assert input_types(SCORE, 8, "bfloat16")[2:] == ["int64", "float32", "float32", *["bfloat16"] * 3]
    assert aliased_inputs(SCORE) == [-1]


def test_select_shares_by_scope() -> None:
    inputs = [(3, "B", 4, "C"), ("B",), ("B",), ("B",), ("B",)]
    for scope, plan in (
        ("per_layer_per_head", (3, "B", 2, "C")),
        ("per_head", (1, "B", 2, "C")),
        ("union", (1, "B", 1, "C")),
    ):
        assert output_shapes(SELECT, inputs, {"scope": scope, "kv_heads": 2}) == [plan, ("B",), ("B",)]
    assert aliased_inputs(SELECT) == [-1, -1, -1]
    assert output_types(SELECT, "float32") == ["int32"] * 3


def test_workspace_is_that_of_the_host_test() -> None:
    model = KernelConfiguration(3, 4, 2, 16, 24, 16, "float16", sinks=2, recent=8)
    # host_test.cpp expects the same of the C++.
    assert select_workspace(model, 5, 100) == 12032
    assert select_workspace(replace(model, scope="per_head"), 5, 100) == 1024 + 4096
