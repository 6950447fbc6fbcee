"""KeySieveAttend of the custom-op library, on every instruction set that this processor has, against plain torch."""

from functools import lru_cache

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from keysieve.kernels import reference
from keysieve.plugins.contract import ATTEND, DOMAIN
from support.library import library_session

# of a cache: ONNX type, numpy type, and one unit in the last place of it, relative
CACHES = {
    "float32": (TensorProto.FLOAT, np.float32, 1.2e-7),
    "float16": (TensorProto.FLOAT16, np.float16, 9.8e-4),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 7.8e-3),
}


@lru_cache
def session(kind, rotated, sinks, window, softcap, threads=1, packed=False, kv_heads=0, heads=""):
    types = {"int32": TensorProto.INT32, "float32": TensorProto.FLOAT, "cache": CACHES[kind][0]}
    left_out = {"cosine": not rotated, "sine": not rotated, "sinks": not sinks, "key_new": packed, "value_new": packed}

    def info(port):
        rank = 3 if packed and port.name == "query" else len(port.shape.split(","))
        return helper.make_tensor_value_info(port.name, types[port.dtype], [None] * rank)

    ports = [port for port in ATTEND.inputs if not left_out.get(port.name)]
    names = ["" if left_out.get(port.name) else port.name for port in ATTEND.inputs]
    node = helper.make_node(
        ATTEND.name,
        names,
        [port.name for port in ATTEND.outputs],
        domain=DOMAIN,
        layer=1,
        scale=0.25,
        softcap=softcap,
        window=window,
        kv_heads=kv_heads,
        heads=heads,
    )
    return library_session([node], [info(p) for p in ports], [info(p) for p in ATTEND.outputs], threads)


def inputs(states, tokens, heads, group, dim, value_dim, capacity, plan_layers=2, seed=0):
    """states: (length, keep) of every sequence."""
    rng = np.random.default_rng(seed)
    batch = len(states)
    length, keep = (np.array(column, np.int32) for column in zip(*states, strict=True))
    plan = np.zeros((plan_layers, batch, heads, capacity), np.int32)
    for layer in range(plan_layers):
        for b, (held, kept) in enumerate(states):
            for head in range(heads):
                plan[layer, b, head, : max(kept, 0)] = np.sort(rng.permutation(held)[: max(kept, 0)])
    normal = rng.standard_normal
    angle = rng.uniform(0, 6, (batch, tokens, dim // 2))
    return {
        "query": normal((batch, tokens, heads * group, dim)).astype(np.float32),
        "key_new": normal((batch, tokens, heads, dim)).astype(np.float32),
        "value_new": normal((batch, tokens, heads, value_dim)).astype(np.float32),
        "length": length,
        "plan": plan,
        "keep": keep,
        "key": normal((batch, heads, capacity, dim)).astype(np.float32),
        "value": normal((batch, heads, capacity, value_dim)).astype(np.float32),
        "cosine": np.cos(np.concatenate([angle, angle], -1)).astype(np.float32),
        "sine": np.sin(np.concatenate([angle, angle], -1)).astype(np.float32),
        "sinks": normal(heads * group).astype(np.float32),
    }


def expected(given, kind, window, softcap):
    """Plain torch: read, and both caches."""
    name = kind
    t = {key: torch.from_numpy(value) for key, value in given.items()}
    cache = {n: t[n].to(getattr(torch, name)) for n in ("key", "value")}
    query, key_new = t["query"].transpose(1, 2), t["key_new"].transpose(1, 2)
    if "cosine" in t:
        cos, sin = t["cosine"][:, None], t["sine"][:, None]
        half = query.shape[3] // 2
        query, key_new = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (query, key_new))
    new = [x.to(cache["key"].dtype) for x in (key_new, t["value_new"].transpose(1, 2))]
    key, value = reference.update(*new, t["length"], t["plan"], t["keep"], cache["key"], cache["value"], layer=1)
    start = torch.where(t["keep"] >= 0, t["keep"], t["length"])
    last = start[:, None] + torch.arange(query.shape[2])  # [B,S]
    row = torch.arange(key.shape[2])
    seen = row <= last[..., None]
    if window:
        seen &= row > last[..., None] - window
    read = reference.attend(query, key.float(), value.float(), seen[:, None], 0.25, softcap, t.get("sinks"))
    return read.transpose(1, 2).numpy(), key, value


def together(given):
    """Queries, new keys and new values of a token behind each other, in "query"."""
    names = ("query", "key_new", "value_new")
    parts = [given[name].reshape(*given[name].shape[:2], -1) for name in names]
    return {
        "query": np.concatenate(parts, -1),
        **{name: array for name, array in given.items() if name not in names},
    }


def check(given, kind, window=0, softcap=0.0, threads=1, in_place=False, packed=False, whole=None):
    """whole: new tokens of all heads of the layer, and which of them the cache has."""
    onnx_type, numpy_type, unit = CACHES[kind]
    # A rotated key may be rounded to the other side.
    tolerance = max(2e-5, unit if "cosine" in given else 0)
    wanted, *caches = expected(given, kind, window, softcap)
    names = {}
    if whole is not None:
        new, heads = whole
        names = {"kv_heads": new["key_new"].shape[2], "heads": ",".join(map(str, heads))}
        given = given | new
    runner = session(kind, "cosine" in given, "sinks" in given, window, softcap, threads, packed, **names)
    given = together(given) if packed else given
    binding, values = runner.io_binding(), {}
    for name, array in given.items():
        array = array.astype(numpy_type) if name in ("key", "value") else array
        stored = array.view(np.uint16) if numpy_type is ml_dtypes.bfloat16 and name in ("key", "value") else array
        make = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        kind_of = onnx_type if name in ("key", "value") else TensorProto.INT32 if array.dtype == np.int32 else 1
        values[name] = (stored.copy(), None)
        values[name] = (values[name][0], make(values[name][0], kind_of))
        binding.bind_ortvalue_input(name, values[name][1])
    read = np.zeros(wanted.shape, np.float32)
    binding.bind_ortvalue_output("read", ort.OrtValue.ortvalue_from_numpy(read))
    out = {}
    for name in ("key", "value"):
        array = values[name][0] if in_place else np.zeros_like(values[name][0])
        out[name] = array
        value = values[name][1] if in_place else ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx_type)
        binding.bind_ortvalue_output(f"{name}_out", value)
    runner.run_with_iobinding(binding)
    np.testing.assert_allclose(read, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))
    tokens = given["query"].shape[1]
    start = np.where(given["keep"] >= 0, given["keep"], given["length"])
    for name, cache in zip(("key", "value"), caches, strict=True):
        for b, first in enumerate(start):
            found = out[name].view(numpy_type)[b, :, : first + tokens].astype(np.float32)
            held = cache[b, :, : first + tokens].float().numpy()
            kept = slice(0, first)
            assert np.array_equal(found[:, kept], held[:, kept])  # moved, not computed
            np.testing.assert_allclose(found[:, first:], held[:, first:], rtol=2 * unit, atol=1e-6)
    return read


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(
    ("heads", "group", "dim", "value_dim"), [(2, 3, 64, 64), (1, 1, 16, 32), (2, 2, 24, 8), (1, 7, 128, 80)]
)
def test_attention_equals_plain_torch(heads, group, dim, value_dim, tokens, kind, instructions):
    given = inputs([(90, 40), (0, -1), (130, -1)], tokens, heads, group, dim, value_dim, 200)
    del given["sinks"]
    check(given, kind)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("kind", CACHES)
def test_every_option(kind, tokens, instructions):
    states = [(90, 40), (100, -1)]
    for left_out, window, softcap in (
        (["cosine", "sine", "sinks"], 0, 0),
        (["cosine", "sine"], 17, 0),
        ([], 0, 3),
        ([], 33, 5),
    ):
        given = inputs(states, tokens, 2, 2, 32, 32, 150)
        for name in left_out:
            del given[name]
        check(given, kind, window, float(softcap))


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("value_dim", [32, 48])
def test_queries_keys_and_values_may_come_together(tokens, value_dim, instructions):
    given = inputs([(60, 20), (50, -1)], tokens, 2, 3, 32, value_dim, 80)
    assert np.array_equal(check(given, "float16", packed=True), check(given, "float16"))
    del given["cosine"], given["sine"], given["sinks"]
    assert np.array_equal(check(given, "float32", packed=True), check(given, "float32"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("heads", [[0, 2], [1], [2, 0, 1]], ids=str)
def test_a_cache_may_be_for_some_heads_of_the_layer(heads, tokens, packed, instructions):
    """Its heads read what they would of a layer that had no others."""
    names, group = ("query", "key_new", "value_new"), 2
    layer = inputs([(60, 20), (50, -1)], tokens, 3, group, 32, 48, 80)
    given = inputs([(60, 20), (50, -1)], tokens, len(heads), group, 32, 48, 80, seed=1)
    queries = [head * group + query for head in heads for query in range(group)]
    for name in names:
        given[name] = np.ascontiguousarray(layer[name][:, :, queries if name == "query" else heads])
    given |= {name: layer[name] for name in ("cosine", "sine")}
    check(given, "float16", packed=packed, whole=({name: layer[name] for name in names}, heads))


@pytest.mark.parametrize("tokens", [1, 16])
def test_it_works_in_place(tokens, instructions):
    check(inputs([(60, 20), (50, -1), (3, 0)], tokens, 2, 2, 32, 32, 80), "float16", in_place=True)


def test_threads_and_long_caches_change_nothing(instructions):
    """A decoding step splits a cache by rows, at places that do not depend on the threads."""
    given = inputs([(3000, -1), (1023, -1)], 1, 2, 3, 64, 64, 3100)
    one, two = (check(given, "float32", threads=threads) for threads in (1, 2))
    assert np.array_equal(one, two)


def test_logits_of_any_size(instructions):
    """Weights come from differences of logits: no overflow, and rows far below the best weigh nothing."""
    given = inputs([(100, -1)], 1, 1, 2, 32, 32, 128)
    given["query"] *= 1000
    del given["sinks"]
    check(given, "float32")
    given = inputs([(100, -1)], 30, 1, 2, 32, 32, 140)
    given["query"] *= 1000
    del given["sinks"]
    check(given, "float32")


def test_half_precision_is_rounded_as_everywhere(instructions):
    """Every float16 and bfloat16, and ties, subnormals, infinities: rows of a cache are those of numpy."""
    every = np.arange(1 << 16, dtype=np.uint16)
    for kind in ("float16", "bfloat16"):
        numpy_type = CACHES[kind][1]
        values = every.view(numpy_type).astype(np.float32)
        values = values[np.isfinite(values)]
        between = np.nextafter(values, np.float32(np.inf)), (values + np.roll(values, 1)) / 2
        values = np.concatenate([values, *between, [np.inf, -np.inf, 1e38, -1e38, 65519.9, 65520, 1e-9]]).astype(
            np.float32
        )
        values = np.resize(values, (len(values) // 32 + 1) * 32)
        rows = values.reshape(1, -1, 1, 32)
        tokens = rows.shape[1]
        given = inputs([(0, -1)], 1, 1, 1, 32, 32, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = rows.astype(numpy_type).astype(np.float32)
        runner = session(kind, False, False, 1, 0.0)
        for start in range(0, tokens, 2048):
            part = rows[:, start : start + 2048]
            cache = np.zeros((1, 1, part.shape[1], 32), np.uint16)
            plan = np.zeros((1, 1, 1, part.shape[1]), np.int32)
            feed = {"query": part * 0, "key_new": part * 0, "value_new": part, "length": given["length"], "plan": plan,
                    "keep": given["keep"]}  # fmt: skip
            binding = runner.io_binding()
            for name, array in feed.items():
                binding.bind_cpu_input(name, np.nan_to_num(array) if name in ("query", "key_new") else array)
            for name in ("key", "value"):
                buffer = cache.copy() if name == "key" else cache
                value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(buffer, CACHES[kind][0])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(f"{name}_out", value)
            binding.bind_output("read")
            runner.run_with_iobinding(binding)
            found = cache.view(numpy_type).astype(np.float32)[0, 0]
            assert np.array_equal(found, wanted[0, start : start + 2048, 0])


def test_a_plan_that_cannot_be_is_refused() -> None:
    good = inputs([(60, 20)], 1, 2, 2, 32, 32, 80)
    del good["sinks"]
    runner = session("float32", True, False, 0, 0.0)
    runner.run(None, good)
    plan = good["plan"].copy()
    plan[1, 0, 0, :3] = [5, 0, 6]
    for change, message in (
        ({"plan": plan}, "the plan moves a row backwards, or keeps rows that are not held"),
        ({"length": np.array([80], np.int32), "keep": np.array([-1], np.int32)}, "the capacity is 80"),
        ({"keep": np.array([61], np.int32)}, "holds 60 rows, keeps 61"),
        ({"plan": good["plan"][..., :70]}, "plan is \\[2,1,2,70\\], not \\[-1,1,-1,80\\]"),
        ({"key_new": good["key_new"][..., :16]}, "key_new is \\[1,1,2,16\\], not \\[1,-1,2,32\\]"),
        ({"value_new": good["value_new"][..., :16]}, "value_new is \\[1,1,2,16\\], not \\[1,1,2,32\\]"),
        ({"query": np.repeat(good["query"], 2, 1)}, "key_new has another number of tokens than query"),
        ({"query": good["query"][:, :, :3]}, "the heads of query and key do not fit"),
    ):
        with pytest.raises(Exception, match=f"KeySieveAttend: .*{message}"):
            runner.run(None, {**good, **change})
    packed, runner = together(good), session("float32", True, False, 0, 0.0, packed=True)
    runner.run(None, packed)
    for size in (100, 192 - 64):  # less than a head too much, and no query at all
        with pytest.raises(Exception, match="KeySieveAttend: the heads of query and key do not fit"):
            runner.run(None, {**packed, "query": packed["query"][..., :size]})
