"""The exported file: checked, named, complete, and run by ONNX Runtime and OpenVINO."""

import json
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.errors import ConfigError
from keysieve.export.onnx import _save, export_onnx
from keysieve.plugins.contract import DOMAIN, NODES
from keysieve.plugins.tensorrt.configuration import read_configuration
from keysieve.version import __version__
from support.bundles import tiny_bundle
from support.graphs import SideBySide, evicting, run

pytestmark = pytest.mark.slow

EVICTION = EvictionConfig(PolicyConfig("triattention"), budget=16, interval=6, sinks=2, recent=4)
BATCH, CAPACITY, LAYERS, KV_HEADS, HEAD_DIM = 2, 26, 3, 2, 16
CACHES = [f"{name}_{layer}" for layer in range(LAYERS) for name in ("key", "value")]


@pytest.fixture(scope="module")
def bundle(root):
    return tiny_bundle("llama", EVICTION, root)


@pytest.fixture(scope="module")
def inlined(root):
    return tiny_bundle("llama", EVICTION, root, inline=True)


@pytest.fixture(scope="module")
def half(root):
    return tiny_bundle("llama", EVICTION, root, dtype="float16")


def structure(bundle):
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def generate(step, steps=30, dtype=np.float32):
    """Two prompts of unequal length, then greedy tokens; `step` maps named inputs to named outputs."""
    zeros = np.zeros
    state = {name: zeros((BATCH, KV_HEADS, CAPACITY, HEAD_DIM), dtype) for name in CACHES}
    state |= {"length": zeros(BATCH, np.int32), "keep": np.full(BATCH, -1, np.int32)}
    state["plan"] = zeros((LAYERS, BATCH, KV_HEADS, CAPACITY), np.int32)
    position, tokens, count = zeros(BATCH, np.int64), np.random.default_rng(0).integers(3, 300, (BATCH, 9)), ints(9, 6)
    greedy, logits, evicted = [], [], zeros(BATCH, int)
    for _ in range(steps):
        given = {"input_ids": tokens, "logits_at": (count - 1).astype(np.int64)[:, None], "count": count}
        given |= {"position": position, "budget": ints(16, 16), "limit": ints(22, 22), "pinned": ints(0, 0)}
        out = step(state | given)
        state = {name: np.array(out[f"{name}_next"]) for name in state}
        position = position + count
        logits.append(np.array(out["logits"]))
        evicted += out["evicted"]
        tokens, count = logits[-1].argmax(-1), ints(1, 1)
        greedy.append(tokens[:, 0].tolist())
    assert (evicted > 6).all(), "at least two rounds"
    return greedy, np.stack(logits), evicted.tolist()


def ints(*values):
    return np.array(values, np.int32)


def in_onnxruntime(bundle):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(None, given), strict=True))


@pytest.fixture(scope="module")
def generated(bundle):
    return generate(in_onnxruntime(bundle))


# -- the file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["bundle", "inlined", "half"])
def test_file_passes_the_full_check(which, request):
    onnx.checker.check_model(str(request.getfixturevalue(which) / "model.onnx"), full_check=True)


def test_plugin_nodes_and_their_attributes(bundle):
    model = structure(bundle)
    plugins = [node for node in model.graph.node if node.domain]
    counts = Counter(node.op_type for node in plugins)
    assert counts == {"KeySieveUpdate": LAYERS, "KeySieveScore": 1, "KeySieveSelect": 1}
    contract = {node.name: node for node in NODES}
    for node in plugins:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        about = contract[node.op_type]
        assert node.domain == DOMAIN == "trt.plugins"
        assert set(attributes) == {*about.attributes, "plugin_version", "plugin_namespace"}
        assert attributes["plugin_version"] == about.version.encode() and attributes["plugin_namespace"] == b""
        variadic = LAYERS - 1 if about.inputs[-1].variadic else 0
        assert len(node.input) == len(about.required) + variadic and len(node.output) == len(about.outputs)
    layers = [onnx.helper.get_node_attr_value(n, "layer") for n in plugins if n.op_type == "KeySieveUpdate"]
    assert layers == list(range(LAYERS))
    select = next(node for node in plugins if node.op_type == "KeySieveSelect")
    values = {a.name: onnx.helper.get_attribute_value(a) for a in select.attribute}
    assert (values["scope"], values["kv_heads"], values["sinks"], values["recent"]) == (b"per_layer_per_head", 2, 2, 4)
    assert {(f.domain, f.name) for f in model.functions} == {(DOMAIN, node.name) for node in NODES}


def test_update_reads_the_cache_input_and_gives_the_cache_output(bundle):
    """No node may stand between: a runtime could not alias the two buffers."""
    updates = [node for node in structure(bundle).graph.node if node.op_type == "KeySieveUpdate"]
    for layer, node in enumerate(updates):
        assert list(node.input[5:7]) == [f"key_{layer}", f"value_{layer}"]
        assert list(node.output) == [f"key_{layer}_next", f"value_{layer}_next"]


@pytest.mark.parametrize("which", ["bundle", "inlined", "half"])
def test_inputs_and_outputs_have_names_types_and_named_dimensions(which, request):
    graph = structure(request.getfixturevalue(which)).graph
    cache = onnx.TensorProto.FLOAT16 if which == "half" else onnx.TensorProto.FLOAT
    int32, int64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64

    def info(values):
        shape = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        return {v.name: (shape[v.name], v.type.tensor_type.elem_type) for v in values}

    rows, batch = (["batch", KV_HEADS, "capacity", HEAD_DIM], cache), (["batch"], int32)
    plan = ([LAYERS, "batch", KV_HEADS, "capacity"], int32)
    assert info(graph.input) == {
        "input_ids": (["batch", "tokens"], int64),
        "logits_at": (["batch", "wanted"], int64),
        "count": batch,
        "position": (["batch"], int64),
        "length": batch,
        "plan": plan,
        "keep": batch,
        **dict.fromkeys(CACHES, rows),
        "budget": batch,
        "limit": batch,
        "pinned": batch,
    }
    assert info(graph.output) == {
        "logits": (["batch", "wanted", 320], onnx.TensorProto.FLOAT),
        **{f"{name}_next": rows for name in CACHES},
        "length_next": batch,
        "plan_next": plan,
        "keep_next": batch,
        "evicted": batch,
    }


def test_opset_metadata_and_producer(bundle):
    model = structure(bundle)
    assert {o.domain: o.version for o in model.opset_import} == {"": 24, DOMAIN: 1}
    assert model.producer_name == "keysieve"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["keysieve"], metadata["architecture"]) == (__version__, "LlamaForCausalLM")
    eviction = json.loads(metadata["eviction"])
    assert eviction["budget"] == 16 and eviction["policy"]["name"] == "triattention"


def test_weights_are_external_and_the_file_itself_is_small(bundle):
    model = structure(bundle)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert external and all(
        {e.key: e.value for e in t.external_data}["location"] == "model.onnx.data" for t in external
    )
    inside = sum(len(t.raw_data) for t in model.graph.initializer)
    assert inside < 10_000 < (bundle / "model.onnx.data").stat().st_size


def test_nothing_of_the_host_is_in_the_file(bundle, root):
    for file in ("model.onnx", "manifest.json"):
        assert str(root).encode() not in (bundle / file).read_bytes()


# -- the inlined variant ---------------------------------------------------------------------------------------


def test_inlined_file_has_standard_operators_only(inlined):
    model = structure(inlined)
    assert not model.functions and {o.domain for o in model.opset_import} == {""}

    def domains(graph):
        for node in graph.node:
            yield node.domain
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from domains(attribute.g)

    assert set(domains(model.graph)) == {""}


def test_inlined_file_gives_the_same_logits_in_onnxruntime(inlined, generated):
    tokens, logits, evicted = generate(in_onnxruntime(inlined))
    assert (tokens, evicted) == (generated[0], generated[2])
    np.testing.assert_allclose(logits, generated[1], rtol=0, atol=2e-5)


def test_inlined_file_gives_the_same_tokens_in_openvino(inlined, generated):
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(inlined / "model.onnx", "CPU", settings)
    request = compiled.create_infer_request()
    names = [output.get_any_name() for output in compiled.outputs]

    def step(given):
        results = request.infer(given)
        return {name: results[index] for index, name in enumerate(names)}

    tokens, logits, evicted = generate(step)
    assert (tokens, evicted) == (generated[0], generated[2])
    np.testing.assert_allclose(logits, generated[1], rtol=0, atol=1e-4)


# -- layers of several shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [False, True])
def test_each_shape_has_functions_of_its_own(inline, tmp_path):
    """A step that plans, on full caches: the file equals the graph run in torch."""
    graph, rows = evicting(SideBySide(2, 4, 2), "key-norm", "per_layer_per_head"), 12
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "logits_at": torch.tensor([[2]]), "position": torch.tensor([20])}
    numbers = {"count": 3, "length": 9, "keep": -1, "budget": 8, "limit": 12, "pinned": 0}
    given |= {name: torch.tensor([number], dtype=torch.int32) for name, number in numbers.items()}
    for layer, heads in enumerate((2, 4, 2)):
        given |= {f"{name}_{layer}": torch.randn(1, heads, rows, 8) for name in ("key", "value")}
    shapes = {"plan_0": (2, 1, 2, rows), "plan_1": (1, 1, 4, rows)}
    given |= {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    expected = run(graph, given)
    export_onnx(graph, tmp_path / "model.onnx", {}, inline)
    found = in_onnxruntime(tmp_path)({name: value.numpy() for name, value in given.items()})
    assert expected["evicted"].tolist() == found["evicted"].tolist() == [4]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-5, err_msg=name)
    assert {name: found[f"{name}_next"].shape for name in shapes} == shapes
    functions = [(function.name, function.overload) for function in structure(tmp_path).functions]
    named = [(name, overload) for name in ("KeySieveScore", "KeySieveSelect") for overload in "01"]
    assert sorted(functions) == ([] if inline else sorted([*named, ("KeySieveUpdate", "")]))
    if not inline:
        with pytest.raises(ConfigError, match="has 2 KeySieveScore nodes, one for each shape"):
            read_configuration(tmp_path / "model.onnx")


# -- float16 ---------------------------------------------------------------------------------------------------


def test_float16_file_runs_in_onnxruntime(half, generated):
    """Not the same tokens for ever, but the prompt's logits are near, and centres and scores stay float32."""
    _, logits, _ = generate(in_onnxruntime(half), dtype=np.float16)
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    scale = np.abs(generated[1][0]).max()
    np.testing.assert_allclose(logits[0], generated[1][0], rtol=0, atol=0.02 * scale)
    model = structure(half)
    (score,) = [node for node in model.graph.node if node.op_type == "KeySieveScore"]
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    kinds |= {t.name: t.data_type for t in model.graph.initializer}
    assert [kinds[name] for name in score.input[3:5]] == [onnx.TensorProto.FLOAT] * 2


def test_tensors_of_the_same_memory_are_written_once(tmp_path):
    numbers = np.arange(600, dtype=np.float32)
    shapes = {"flat": (600,), "table": (20, 30)}
    values = [
        ir.Value(name=name, const_value=ir.tensor(numbers.reshape(shape), name=name), shape=ir.Shape(shape))
        for name, shape in shapes.items()
    ]
    for value in values:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([], values, nodes=[], initializers=values, opset_imports={"": 24}, name="twins")
    _save(ir.Model(graph, ir_version=11), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size == numbers.nbytes
    read = ir.load(tmp_path / "model.onnx").graph.initializers
    for name, shape in shapes.items():
        assert np.array_equal(read[name].const_value.numpy(), numbers.reshape(shape))
