"""The graph for ONNX Runtime: which attentions become one node, and that it computes what model.onnx computes."""

from collections import Counter

import numpy as np
import onnx
import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.inspect import inspect
from keysieve.compiler.runtimes.onnxruntime import OnnxRuntime
from keysieve.errors import EngineError
from keysieve.plugins.onnxruntime import build
from support.bundles import tiny_bundle

pytestmark = pytest.mark.slow

EVICTION = EvictionConfig(PolicyConfig("triattention"), budget=16, interval=6, sinks=2, recent=4)
ONLINE = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=16, interval=6, sinks=2, recent=4)


def operators(bundle, name="model.onnxruntime.onnx"):
    graph = onnx.load(bundle / name, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def rotated_inside(bundle):
    """For each KeySieveAttend, whether it takes the tables of RoPE."""
    graph = onnx.load(bundle / "model.onnxruntime.onnx", load_external_data=False).graph
    return [len(node.input) > 8 and bool(node.input[8]) for node in graph.node if node.op_type == "KeySieveAttend"]


@pytest.mark.parametrize(
    ("name", "rotated"),
    [
        ("llama", [True, True, True]),
        ("qwen3", [True, True, True]),
        ("cohere", [False, False, False]),  # interleaved: RoPE stays in the graph
        ("gpt_neox", [False, False, False]),  # partial: likewise
    ],
)
def test_attentions_become_one_node(name, rotated, root):
    bundle = tiny_bundle(name, EVICTION, root)
    portable, found = operators(bundle, "model.onnx"), operators(bundle)
    assert found["KeySieveAttend"] == portable["KeySieveUpdate"] == portable["Attention"] == len(rotated)
    assert not found["KeySieveUpdate"] and not found["Attention"]
    assert (found["KeySieveScore"], found["KeySieveSelect"]) == (1, 1)
    assert rotated_inside(bundle) == rotated


def test_what_one_product_makes_goes_in_together(root):
    """With integer weights, query, key and value are one product: no split, no reshape."""
    bundle = tiny_bundle("llama", EVICTION, root, weights="int4", kv_dtype="float16")
    graph = onnx.load(bundle / "model.onnxruntime.onnx", load_external_data=False).graph
    attends = [node for node in graph.node if node.op_type == "KeySieveAttend"]
    products = {node.output[0] for node in graph.node if node.op_type == "KeySieveLinear"}
    assert attends and all(node.input[0] in products and not any(node.input[1:3]) for node in attends)
    apart = tiny_bundle("llama", EVICTION, root)
    graph = onnx.load(apart / "model.onnxruntime.onnx", load_external_data=False).graph
    assert all(all(node.input[:3]) for node in graph.node if node.op_type == "KeySieveAttend")


def steps(engine, budget, prompt=30, new=40):
    """Logits of a prompt in chunks and of tokens that do not depend on them, two sequences."""
    tokens = np.random.default_rng(0).integers(3, 300, (2, prompt + new))
    session = engine.session(batch=2, budget=budget, capacity=16 + 6 + 4, chunk=4)
    sizes = [4] * (prompt // 4) + [1] * new
    found, at = [], 0
    for size, following in zip(sizes, [*sizes[1:], 1], strict=True):
        part = tokens[:, at : at + size]
        every = np.tile(np.arange(size), (2, 1))
        found.append(session.step(part, np.full(2, size, np.int32), every, following).copy())
        at += size
    return np.concatenate(found, 1), session.counters


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("cohere", {}),
        ("gpt_neox", {}),
        ("llama", {"kv_dtype": "float16"}),
        ("llama", {"kv_dtype": "bfloat16"}),
        ("llama", {"weights": "int4", "kv_dtype": "float16"}),
        ("llama", {"dtype": "float16"}),
        ("llama", {"inline": True}),
    ],
    ids=str,
)
def test_with_the_library_as_without(name, options, root):
    bundle = tiny_bundle(name, EVICTION, root, **options)
    found, counters = steps(load(bundle, 1, native=True), 16)
    wanted, expected = steps(load(bundle, 1, native=False), 16)
    assert counters == expected and min(counters.rounds) >= 3
    # Rounding to 8 bits turns the last bit of an activation into one of 256; a half's last bit is 1e-3.
    tolerance = 0.05 if "weights" in options else 2e-2 if len(options) and "inline" not in options else 1e-4
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


def test_online_centres_too(root):
    bundle = tiny_bundle("llama", ONLINE, root)
    (found, counters), (wanted, expected) = (steps(load(bundle, 1, native=native), 16) for native in (True, False))
    assert counters == expected
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("policy", "branches"), [("triattention", 1), ("key-norm", 0)])
def test_centres_turn_when_a_round_is_due(policy, branches, root):
    bundle = tiny_bundle("llama", EvictionConfig(PolicyConfig(policy), budget=16, interval=6, sinks=2, recent=4), root)
    found, portable = operators(bundle), operators(bundle, "model.onnx")
    assert (found["If"], portable["If"]) == (branches, 0)
    if branches:
        graph = onnx.load(bundle / "model.onnxruntime.onnx", load_external_data=False).graph
        decide = next(node for node in graph.node if node.op_type == "If")
        due, idle = (attribute.g for attribute in sorted(decide.attribute, key=lambda one: one.name, reverse=True))
        assert {"Cos", "Sin"} <= {node.op_type for node in due.node} and {node.op_type for node in idle.node} == {
            "Constant"
        }


def test_a_step_allocates_no_cache(root):
    """Both files work in the session's own buffers, whose addresses stay."""
    session = load(tiny_bundle("llama", EVICTION, root), 1, native=True).session(capacity=26)
    addresses = {name: buffer.array.ctypes.data for name, buffer in session._caches.items()}
    session.step(np.full((1, 4), 5), np.array([4], np.int32), np.zeros((1, 1), np.int64))
    assert {name: buffer.array.ctypes.data for name, buffer in session._caches.items()} == addresses
    assert all(
        buffer.array[..., :4, :].any() and not buffer.array[..., 4:, :].any() for buffer in session._caches.values()
    )


def test_without_a_library(root, monkeypatch, caplog, tmp_path):
    bundle = tiny_bundle("llama", EVICTION, root)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    engine = load(bundle, 1)
    assert "without keysieve's custom ops" in caplog.text and "keysieve plugin build --ort" in caplog.text
    assert engine.generate([5, 6, 7], max_new_tokens=3, stop_tokens=[])[0].tokens
    with pytest.raises(EngineError, match="the custom-op library was not built; `keysieve plugin build --ort`"):
        load(bundle, 1, native=True)


def test_a_library_that_cannot_be_used(root, monkeypatch, tmp_path):
    bundle = tiny_bundle("llama", EVICTION, root)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "_library.so").write_bytes(b"no library")
    with pytest.raises(EngineError, match=r"cannot use .*_library\.so: .*plugin build --ort"):
        OnnxRuntime(load(bundle, 1, native=False).bundle)


def test_memory_that_is_not_there(root):
    engine = load(tiny_bundle("llama", EVICTION, root), 1)
    with pytest.raises(EngineError, match=r"no memory for a buffer of .* bytes .*smaller capacity or budget"):
        engine.session(capacity=1 << 30, batch=1 << 8, dense=True)
    with pytest.raises(EngineError, match="a cache has 1 to 2,147,483,646 rows"):
        engine.session(capacity=1 << 31, dense=True)


def test_the_report_says_what_integer_weights_cost(root, capsys):
    bundle = tiny_bundle("llama", EVICTION, root, weights="int4", kv_dtype="float16")
    found = inspect(bundle)
    assert found.dtype == "float16"
    assert found.quantized["weights"] == "int4" and 0.01 < found.quantized["error"] < 0.15
    assert found.quantized["products"] == found.quantized["quantized"] == 3 * 7 + 1
    assert main(["inspect", str(bundle)]) == 0
    assert "int4: 22 of 22 matrices" in capsys.readouterr().out
    assert not inspect(tiny_bundle("llama", EVICTION, root)).quantized
