"""The whole rewritten graph, run eagerly in torch, equals the exported file in ONNX Runtime through several rounds."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from keysieve.compiler import statistics_file
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.pipeline import engine_graph
from support.bundles import tiny_bundle, tiny_statistics
from support.graphs import SideBySide, evicting, match, run

EVICTION = EvictionConfig(PolicyConfig("triattention"), budget=16, interval=6, sinks=2, recent=4)
BATCH, CAPACITY, LAYERS, KV_HEADS, HEAD_DIM = 3, 30, 3, 2, 16


@pytest.fixture(scope="module")
def graph(root):
    statistics = statistics_file.load(tiny_statistics("llama", root))
    return engine_graph(match("llama"), EVICTION, statistics).graph


def test_inputs_and_outputs(graph):
    batch, _ = graph.shape(graph.inputs["input_ids"])
    capacity = graph.symbol("capacity")
    caches = [f"{name}_{layer}" for layer in range(LAYERS) for name in ("key", "value")]
    state = ["count", "position", "length", "plan", "keep"]
    assert list(graph.inputs) == ["input_ids", "logits_at", *state, *caches, "budget", "limit", "pinned"]
    expected = {"logits", "length_next", "plan_next", "keep_next", "evicted", *(f"{name}_next" for name in caches)}
    assert set(graph.outputs) == expected
    for name in ("budget", "limit", "pinned"):
        assert graph.shape(graph.inputs[name]) == (batch,) and graph.inputs[name].meta["val"].dtype == torch.int32
    for name in ("keep_next", "evicted"):
        assert graph.shape(graph.outputs[name]) == (batch,) and graph.outputs[name].meta["val"].dtype == torch.int32
    assert graph.shape(graph.outputs["plan_next"]) == (LAYERS, batch, KV_HEADS, capacity)
    assert graph.shape(graph.outputs["plan_next"]) == graph.shape(graph.inputs["plan"])


def test_one_score_and_one_select_read_the_updated_caches(graph):
    ops = torch.ops.keysieve
    (score,), (select,) = graph.calls(ops.score.default), graph.calls(ops.select.default)
    assert score.args[5] == [graph.outputs[f"key_{layer}_next"] for layer in range(LAYERS)]
    assert select.args[0] is score
    assert score.args[0] is select.args[1] is graph.outputs["length_next"]
    assert select.args[5:] == ("per_layer_per_head", KV_HEADS, EVICTION.sinks, EVICTION.recent)
    assert score.args[6:] == ("trig", 4, HEAD_DIM, 0)


def test_a_score_and_a_select_for_each_shape():
    graph = evicting(SideBySide(2, 4, 2), "streaming", "per_layer_per_head")
    outputs, ops = graph.outputs, torch.ops.keysieve
    scores, selects = graph.calls(ops.score.default), graph.calls(ops.select.default)
    assert [score.args[5] for score in scores] == [
        [outputs["key_0_next"], outputs["key_2_next"]],
        [outputs["key_1_next"]],
    ]
    assert [(select.args[0], select.args[6]) for select in selects] == [(scores[0], 2), (scores[1], 4)]
    assert [outputs[f"plan_{group}_next"].args for group in (0, 1)] == [(select, 0) for select in selects]
    assert {outputs[name].args[1] for name in ("keep_next", "evicted")} == {1, 2}
    assert all(graph.shape(outputs[f"plan_{n}_next"]) == graph.shape(graph.inputs[f"plan_{n}"]) for n in (0, 1))


def start():
    zeros = np.zeros
    caches = {
        f"{name}_{n}": zeros((BATCH, KV_HEADS, CAPACITY, HEAD_DIM), np.float32)
        for n in range(LAYERS)
        for name in ("key", "value")
    }
    return caches | {
        "position": zeros(BATCH, np.int64),
        "length": zeros(BATCH, np.int32),
        "plan": zeros((LAYERS, BATCH, KV_HEADS, CAPACITY), np.int32),
        "keep": np.full(BATCH, -1, np.int32),
    }


def drive(step):
    """Prompts of unequal length, then single tokens; returns what every step gave."""
    rng = np.random.default_rng(0)
    state, history = start(), []
    for number in range(26):
        tokens = rng.integers(3, 300, (BATCH, 8 if number < 3 else 1))
        count = np.array([8, 8 if number == 0 else 0, 5], np.int32) if number < 3 else np.ones(BATCH, np.int32)
        given = state | {
            "input_ids": tokens,
            "logits_at": np.maximum(count - 1, 0)[:, None].astype(np.int64),
            "count": count,
            "budget": np.array([16, 16, 12], np.int32),
            "limit": np.array([22, 22, 18], np.int32),
            "pinned": np.array([0, 0, 5], np.int32),
        }
        out = step(given)
        state |= {name: out[f"{name}_next"] for name in state if name != "position"}
        state["position"] = state["position"] + count
        history.append(out)
    return history


@pytest.mark.slow
def test_eager_torch_equals_onnx_runtime(graph, root):
    bundle = tiny_bundle("llama", EVICTION, root)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def eager(given):
        out = run(graph, {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()})
        return {name: value.numpy() for name, value in out.items()}

    ours = drive(eager)
    theirs = drive(lambda given: dict(zip(names, session.run(None, given), strict=True)))
    rounds = np.zeros(BATCH, int)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in ("length_next", "keep_next", "evicted"):
            assert np.array_equal(a[name], b[name]), f"{name} of step {step}"
        for sequence, kept in enumerate(a["keep_next"]):
            if kept >= 0:
                rounds[sequence] += 1
                assert np.array_equal(a["plan_next"][:, sequence], b["plan_next"][:, sequence])
        np.testing.assert_allclose(a["logits"], b["logits"], rtol=1e-4, atol=5e-5)
    assert rounds.min() >= 2 and any(0 < (a["keep_next"] >= 0).sum() < BATCH for a in ours)
