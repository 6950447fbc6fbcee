"""Every ONNX node, run in ONNX Runtime on a model of that node, by function body and library, against the reference."""

from functools import lru_cache
from itertools import product

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, checker, helper

from keysieve.kernels import SCOPES, reference
from keysieve.plugins.contract import DOMAIN, LINEAR_ATTENTION, NAMESPACE, SCORE, SELECT, UPDATE, plan_shape
from keysieve.plugins.onnx.body import OPSET
from keysieve.plugins.onnx.functions import linear_attention_function, score_function, select_function, update_function
from keysieve.plugins.onnxruntime.build import find_library

FLOATS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}
FIXED = {"int32": TensorProto.INT32, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
INF, NAN = float("inf"), float("nan")


def one_node_model(function, contract, cache=np.float32, **attributes):
    """A model of that function's node alone, with no size fixed."""
    ports = {port.name: port for port in (*contract.inputs, *contract.outputs)}

    def info(name):
        port = ports[name if name in ports else name.rpartition("_")[0]]
        kind = FLOATS[cache] if port.dtype == "cache" else FIXED[port.dtype]
        return helper.make_tensor_value_info(name, kind, [None] * len(port.shape.split(",")))

    attributes |= {"plugin_version": contract.version, "plugin_namespace": NAMESPACE}
    node = helper.make_node(contract.name, function.input, function.output, domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node], contract.name, [info(name) for name in function.input], [info(name) for name in function.output]
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)


@pytest.fixture(autouse=True, params=["functions", "library"])
def carrier(request):
    """What runs the nodes in this test."""
    Carrier.library = find_library() if request.param == "library" else None
    if request.param == "library" and Carrier.library is None:
        pytest.fail("the custom-op library was not built: is there a C++ compiler?")
    return request.param


class Carrier:
    library = None


functions_only = pytest.mark.parametrize("carrier", ["functions"], indirect=True)


def open_session(model):
    return cached_session(model.SerializeToString(), Carrier.library)


@lru_cache
def cached_session(model, library):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def update_session(layer=0, cache=np.float32):
    return open_session(one_node_model(update_function(), UPDATE, cache, layer=layer))


def score_session(layers, query_heads, kv_heads, policy, rotary_dim, interleaved, rows, cache=np.float32):
    function = score_function(layers, query_heads, kv_heads, policy, rotary_dim, interleaved, rows)
    attributes = {"policy": policy, "query_heads": query_heads, "rotary_dim": rotary_dim}
    return open_session(one_node_model(function, SCORE, cache, **attributes, interleaved=int(interleaved)))


def select_session(layers, kv_heads, scope, sinks, recent):
    function = select_function(layers, kv_heads, scope, sinks, recent)
    attributes = {"scope": scope, "kv_heads": kv_heads, "sinks": sinks, "recent": recent}
    return open_session(one_node_model(function, SELECT, **attributes))


def ints(*values, dtype=np.int32):
    return np.array(values, dtype)


def tensors(arrays):
    return [torch.from_numpy(array) for array in arrays]


def random_normal(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


# -- the nodes themselves --------------------------------------------------------------------------------------


@functions_only
@pytest.mark.parametrize(
    "model",
    [
        one_node_model(update_function(), UPDATE, layer=1),
        one_node_model(
            score_function(2, 4, 2, "trig", 8, False, 1),
            SCORE,
            policy="trig",
            query_heads=4,
            rotary_dim=8,
            interleaved=0,
        ),
        one_node_model(select_function(2, 2, "union", 4, 8), SELECT, scope="union", kv_heads=2, sinks=4, recent=8),
    ],
    ids=["update", "score", "select"],
)
def test_function_passes_the_checker(model):
    checker.check_model(model, full_check=True)


# -- update ----------------------------------------------------------------------------------------------------

LAYERS, HEADS, CAPACITY = 3, 2, 12
# (length, keep) of every sequence; keep -1: nothing planned
STATES = {
    "one of three compacts": [(9, 4), (5, -1), (7, -1)],
    "all compact": [(9, 4), (10, 1), (8, 8)],
    "to nothing": [(9, 0), (3, -1), (1, 1)],
    "none compacts": [(0, -1), (8, -1), (3, -1)],
    "the shortest beside the longest": [(0, -1), (10, 9), (1, -1)],
    "alone": [(10, 7)],
    "alone and empty": [(0, -1)],
    "pair": [(6, 3), (8, -1)],
}


def update_inputs(states, plan_layers, plan_heads, tokens, dtype=np.float32, capacity=CAPACITY):
    rng = np.random.default_rng(7)
    batch = len(states)
    length, keep = (ints(*column) for column in zip(*states, strict=True))
    plan = rng.integers(0, capacity, (plan_layers, batch, plan_heads, capacity)).astype(np.int32)  # rubbish
    for layer, (b, (held, kept)), head in product(range(plan_layers), enumerate(states), range(plan_heads)):
        if kept >= 0:
            plan[layer, b, head, :kept] = np.sort(rng.permutation(held)[:kept])
    return {
        "key_new": random_normal(rng, (batch, HEADS, tokens, 6), dtype),
        "value_new": random_normal(rng, (batch, HEADS, tokens, 4), dtype),
        "length": length,
        "plan": plan,
        "keep": keep,
        "key": random_normal(rng, (batch, HEADS, capacity, 6), dtype),
        "value": random_normal(rng, (batch, HEADS, capacity, 4), dtype),
    }


def check_update(found, given, layer):
    expected = reference.update(*tensors(given.values()), layer=layer)
    tokens = given["key_new"].shape[2]
    start = np.where(given["keep"] >= 0, given["keep"], given["length"])
    for out, wanted in zip(found, expected, strict=True):
        assert out.dtype == given["key"].dtype and out.shape == tuple(wanted.shape)
        assert np.isfinite(out).all()
        for b, first in enumerate(start):
            held = (b, slice(None), slice(first + tokens))
            assert out[held].tobytes() == wanted.numpy()[held].tobytes()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("state", STATES)
def test_update_equals_the_reference_on_held_rows(state, dtype, tokens):
    for plan_layers, plan_heads, layer in product((1, LAYERS), (1, HEADS), range(LAYERS)):
        given = update_inputs(STATES[state], plan_layers, plan_heads, tokens, dtype)
        before = {name: array.copy() for name, array in given.items()}
        found = update_session(layer, dtype).run(None, given)
        check_update(found, given, layer)
        for name, array in given.items():
            assert array.tobytes() == before[name].tobytes(), f"{name} was modified"


def test_update_fills_the_capacity_to_the_last_row():
    given = update_inputs([(10, 6), (3, -1), (9, 3)], LAYERS, HEADS, 6)
    check_update(update_session(1).run(None, given), given, 1)
    given = update_inputs([(0, -1)], 1, 1, CAPACITY)
    check_update(update_session(0).run(None, given), given, 0)


@functions_only
@pytest.mark.parametrize("state", STATES)
def test_update_writes_no_row_twice(state):
    """ScatterND with equal targets is undefined, and with several threads wrong."""
    model = one_node_model(update_function(), UPDATE, layer=0)
    function = model.functions[0]
    function.output.append(next(node.input[1] for node in function.node if node.op_type == "ScatterND"))
    model.graph.node[0].output.append("target")
    model.graph.output.append(helper.make_tensor_value_info("target", TensorProto.INT64, [None] * 4))
    *_, target = open_session(model).run(None, update_inputs(STATES[state], LAYERS, HEADS, 2))
    rows = target.reshape(-1, 3)
    assert len(np.unique(rows, axis=0)) == len(rows) and rows.min() >= 0
    assert (rows.max(axis=0) < [len(STATES[state]), HEADS, CAPACITY]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("state", STATES)
def test_update_works_in_place(state, dtype):
    """As a session binds it: the cache input and the cache output are one buffer."""
    given = update_inputs(STATES[state], LAYERS, HEADS, 2, dtype)
    session = update_session(1, dtype)
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in given.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in ("key", "value"):
        binding.bind_ortvalue_output(f"{name}_out", values[name])
    session.run_with_iobinding(binding)
    check_update([values["key"].numpy(), values["value"].numpy()], given, 1)


def test_update_twice_in_place_runs_a_round_and_goes_on():
    given = update_inputs([(10, 4), (6, -1), (8, -1)], 1, HEADS, 1)
    session = update_session(0)
    cache = {name: ort.OrtValue.ortvalue_from_numpy(given[name].copy()) for name in ("key", "value")}
    expected = tensors([given["key"], given["value"]])
    for _ in range(3):
        expected = reference.update(*tensors(list(given.values())[:5]), *expected, layer=0)
        binding = session.io_binding()
        for name in given:
            if name in cache:
                binding.bind_ortvalue_input(name, cache[name])
                binding.bind_ortvalue_output(f"{name}_out", cache[name])
            else:
                binding.bind_cpu_input(name, given[name])
        session.run_with_iobinding(binding)
        given["length"] = np.where(given["keep"] >= 0, given["keep"], given["length"]).astype(np.int32) + 1
        given["keep"] = ints(-1, -1, -1)
    for b, rows in enumerate(given["length"]):
        for name, wanted in zip(cache, expected, strict=True):
            assert np.array_equal(cache[name].numpy()[b, :, :rows], wanted[b, :, :rows].numpy())


# -- score -----------------------------------------------------------------------------------------------------


def score_inputs(rng, layers, query_heads, kv_heads, head_dim, rotary_dim, rows, length, limit, position, dtype):
    """Inputs of the contract with a cache of 9 rows; policies without centres take a rotary_dim of 0."""
    batch = len(length)
    stateless = rotary_dim == 0
    return {
        "length": ints(*length),
        "limit": ints(*limit),
        "position": ints(*position, dtype=np.int64),
        "centre": np.zeros((1,) * 5, np.float32)
        if stateless
        else random_normal(rng, (layers, batch, query_heads, rows, head_dim)),
        "weight": np.zeros((1,) * 4, np.float32)
        if stateless
        else np.abs(random_normal(rng, (layers, batch, query_heads, rotary_dim // 2))),
        **{f"key_{layer}": random_normal(rng, (batch, kv_heads, 9, head_dim), dtype) for layer in range(layers)},
    }


def reference_score(given, policy, query_heads, rotary_dim, interleaved):
    arguments = tensors(given.values())
    return reference.score(
        *arguments[:5],
        arguments[5:],
        policy=policy,
        query_heads=query_heads,
        rotary_dim=rotary_dim,
        interleaved=int(interleaved),
    ).numpy()


def check_score(given, policy, query_heads, kv_heads, rotary_dim=0, interleaved=False, rows=1, dtype=np.float32):
    layers = sum(name.startswith("key_") for name in given)
    session = score_session(layers, query_heads, kv_heads, policy, rotary_dim, interleaved, rows, dtype)
    (found,) = session.run(None, given)
    expected = reference_score(given, policy, query_heads, rotary_dim, interleaved)
    assert found.dtype == np.float32 and found.shape == expected.shape
    for b, held in enumerate(given["length"]):
        if held < given["limit"][b]:
            continue  # a score of a sequence that is not due means nothing
        part = (slice(None), b, slice(None), slice(held))
        scale = max(1.0, np.abs(expected[part]).max(initial=0))
        np.testing.assert_allclose(found[part], expected[part], rtol=1e-5, atol=1e-5 * scale)
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [8, 4], ids=["full", "partial"])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_trig_score_equals_the_reference(group, rotary_dim, interleaved, rows, dtype):
    rng = np.random.default_rng(group)
    for batch in (1, 3):
        limit = [9] + [20] * (batch - 1)  # only the first is due
        given = score_inputs(
            rng, 2, 2 * group, 2, 8, rotary_dim, rows, [9, 4, 0][:batch], limit, [5, 70000, 0][:batch], dtype
        )
        check_score(given, "trig", 2 * group, 2, rotary_dim, interleaved, rows, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 32), (24, 16)])
@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize("carrier", ["library"], indirect=True)
def test_trig_score_on_every_instruction_set(group, head_dim, rotary_dim, instructions, dtype):
    """Caches of more than one block of rows, and heads of whole and of broken vectors."""
    rng, rows = np.random.default_rng(group), 150
    given = score_inputs(rng, 2, 2 * group, 2, head_dim, rotary_dim, 1, [rows, 71], [1, 1], [rows, 9], dtype)
    for layer in range(2):
        given[f"key_{layer}"] = random_normal(rng, (2, 2, rows, head_dim), dtype)
    check_score(given, "trig", 2 * group, 2, rotary_dim, False, 1, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("policy", ["key_norm", "streaming", "random"])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_stateless_scores_equal_the_reference(policy, group, dtype):
    rng = np.random.default_rng(group)
    for batch in (1, 2, 3):
        positions = [4092, 0, (1 << 40) + 12345][:batch]
        given = score_inputs(rng, 3, 2 * group, 2, 8, 0, 1, [7, 9, 1][:batch], [9, 9, 1][-batch:], positions, dtype)
        check_score(given, policy, 2 * group, 2, dtype=dtype)


def test_random_scores_are_the_same_bits_in_both():
    given = score_inputs(np.random.default_rng(0), 3, 4, 2, 8, 0, 1, [9, 9], [1, 1], [123456789, 7], np.float32)
    assert np.array_equal(check_score(given, "random", 4, 2), reference_score(given, "random", 4, 0, False))


def test_score_is_idle_when_no_sequence_is_due(carrier):
    for policy, rotary_dim in (("trig", 8), ("key_norm", 0), ("streaming", 0), ("random", 0)):
        given = score_inputs(np.random.default_rng(0), 2, 4, 2, 8, rotary_dim, 1, [8, 3], [9, 4], [1, 1], np.float32)
        given["key_0"][:] = NAN  # not even looked at
        (found,) = score_session(2, 4, 2, policy, rotary_dim, False, 1).run(None, given)
        assert found.shape == (2, 2, 4, 9) and (carrier == "library" or not found.any())


def test_scores_of_half_precision_keys_are_summed_in_float32():
    given = score_inputs(np.random.default_rng(0), 1, 1, 1, 8, 8, 1, [9], [9], [0], np.float16)
    given["key_0"][:] = 300  # 300 ** 2 overflows float16
    given["centre"][:] = 300
    found = check_score(given, "trig", 1, 1, 8, dtype=np.float16)
    assert np.isfinite(found).all() and found.max() > 65504


# -- select ----------------------------------------------------------------------------------------------------


def check_select(scores, length, limit, budget, pinned, scope, kv_heads, sinks, recent):
    given = {
        "scores": scores,
        "length": ints(*length),
        "limit": ints(*limit),
        "budget": ints(*budget),
        "pinned": ints(*pinned),
    }
    layers, batch, _, capacity = scores.shape
    found = select_session(layers, kv_heads, scope, sinks, recent).run(None, given)
    expected = reference.select(*tensors(given.values()), scope=scope, kv_heads=kv_heads, sinks=sinks, recent=recent)
    plan, keep, evicted = found
    assert plan.shape == plan_shape(scope, layers, batch, kv_heads, capacity)
    assert plan.dtype == keep.dtype == evicted.dtype == np.int32
    for b, kept in enumerate(keep):  # the plan of a sequence that is not due means nothing
        if kept >= 0:
            assert np.array_equal(plan[:, b], expected[0][:, b].numpy())
    assert np.array_equal(keep, expected[1].numpy()) and np.array_equal(evicted, expected[2].numpy())
    return plan, keep, evicted


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_selection_equals_the_reference(batch, group, scope):
    rng = np.random.default_rng(batch * 10 + group)
    capacity = 40
    for sinks, recent in ((0, 0), (2, 5)):
        scores = random_normal(rng, (3, batch, 2 * group, capacity)) * 50 - 20
        length, limit = [33, 20, capacity][:batch], [33, 33, capacity + 1][:batch]  # one of three is due
        check_select(scores, length, limit, [16] * batch, [0, 3, 9][:batch], scope, 2, sinks, recent)
        length, limit = [capacity, 17, 30][:batch], [20, 16, 30][:batch]  # all are due, by different budgets
        check_select(scores, length, limit, [12, 16, 29][:batch], [5, 0, 9][:batch], scope, 2, sinks, recent)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 24])
def test_selection_at_every_length(length, scope):
    scores = random_normal(np.random.default_rng(length), (2, 1, 4, 24))
    _, keep, evicted = check_select(scores, [length], [0], [16], [0], scope, 2, 2, 4)
    assert (keep[0], evicted[0]) == (min(16, length), max(0, length - 16))


@pytest.mark.parametrize("scope", SCOPES)
def test_ties_go_to_the_lowest_row(scope):
    scores = np.full((2, 2, 4, 50), 3.25, np.float32)
    plan, _, _ = check_select(scores, [50, 50], [50, 51], [20, 20], [0, 0], scope, 2, 0, 0)
    assert (plan[:, 0, :, :20] == np.arange(20)).all()
    scores[..., ::3] = 0.1
    check_select(scores, [50, 47], [50, 40], [20, 25], [0, 0], scope, 2, 2, 3)
    scores[:] = 1e30  # sums overflow unless taken relative to the highest
    check_select(scores, [50, 47], [50, 40], [20, 25], [0, 0], scope, 2, 2, 3)


@pytest.mark.parametrize("scope", SCOPES)
def test_scores_that_are_not_finite_rank_last(scope):
    rng = np.random.default_rng(5)
    for rate in (0.2, 0.9, 1.0):
        scores = random_normal(rng, (2, 3, 4, 30))
        for special in (NAN, INF, -INF):
            scores[rng.random(scores.shape) < rate / 3] = special
        if rate == 1.0:
            scores[:] = NAN
        check_select(scores, [30, 28, 9], [30, 20, 9], [10, 12, 4], [0, 2, 0], scope, 2, 1, 2)


@pytest.mark.parametrize("scope", SCOPES)
def test_negative_zero_ties_with_zero(scope):
    scores = np.zeros((2, 1, 4, 20), np.float32)
    scores[..., ::2] = -0.0
    plan, _, _ = check_select(scores, [20], [20], [8], [0], scope, 2, 0, 0)
    assert (plan[..., :8] == np.arange(8)).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_rows_that_are_not_held_are_never_kept(scope):
    scores = random_normal(np.random.default_rng(0), (2, 2, 4, 30))
    scores[:, 0, :, 12:], scores[:, 1, :, 20:] = 1e9, NAN
    plan, keep, _ = check_select(scores, [12, 20], [12, 20], [10, 10], [0, 0], scope, 2, 2, 2)
    assert keep.tolist() == [10, 10] and plan[:, 0].max() < 12 and plan[:, 1].max() < 20


@pytest.mark.parametrize("scope", SCOPES)
def test_more_protected_rows_than_the_budget_holds(scope):
    scores = random_normal(np.random.default_rng(0), (2, 2, 4, 30))
    plan, keep, _ = check_select(scores, [30, 25], [30, 20], [6, 6], [9, 0], scope, 2, 2, 8)
    assert keep.tolist() == [6, 6]
    assert (plan[:, 0, :, :6] == np.arange(6)).all()
    assert (plan[:, 1, :, :6] == [0, 1, 17, 18, 19, 20]).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_select_is_idle_when_no_sequence_is_due(scope, carrier):
    scores = np.full((2, 2, 4, 30), NAN, np.float32)
    plan, keep, evicted = check_select(scores, [10, 29], [11, 30], [6, 6], [0, 0], scope, 2, 2, 2)
    assert keep.tolist() == [-1, -1] and evicted.tolist() == [0, 0]
    assert carrier == "library" or not plan.any()


@functions_only
@pytest.mark.parametrize("delta", [0, 1])
@pytest.mark.parametrize("tokens", [1, 6])
def test_linear_attention_equals_the_reference(tokens, delta):
    model = one_node_model(linear_attention_function(), LINEAR_ATTENTION, delta=delta)
    checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    shapes = {"query": (tokens, 4), "key": (tokens, 4), "value": (tokens, 5), "decay": (tokens,), "rate": (tokens,)}
    shapes["state"] = (4, 5)
    given = {name: rng.normal(size=(2, 3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    given["decay"] = -np.abs(given["decay"])
    found = open_session(model).run(None, given)
    expected = reference.linear_attention(*(torch.from_numpy(value) for value in given.values()), bool(delta))
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, wanted.numpy(), rtol=1e-5, atol=1e-5)
