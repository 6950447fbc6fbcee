"""Attention over the cache in ONNX Runtime: what appends and attends fastest, A B C D in turns in one process.

    python benchmarks/attention.py [--rows 512,2048,8192] [--batch 1,8] [--tokens 1,128] [--turns 7] [--threads 1]

One layer of SmolLM2's shape (9 query heads, 3 KV heads, 64 dims) gets `tokens` new tokens behind `rows` held ones:
    portable    KeySieveUpdate's function body, and ONNX's Attention with a mask, as in model.onnx
    gqa         com.microsoft GroupQueryAttention, without RoPE, its cache in place
    attend      KeySieveAttend of keysieve's library, in float32 and with a float16 cache
Every variant works in place, on a cache of rows + 128. CPU milliseconds, and ratios to the portable form.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from keysieve.compiler.bundle import write_atomically
from keysieve.plugins.contract import ATTEND, DOMAIN, NAMESPACE, UPDATE
from keysieve.plugins.onnx.body import OPSET
from keysieve.plugins.onnx.functions import update_function
from keysieve.plugins.onnxruntime.build import find_library

RESULT = Path(__file__).parent / "results" / "attention.json"
HEADS, KV_HEADS, DIM = 9, 3, 64
SCALE = DIM**-0.5
FLOAT, HALF, INT32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", "512,2048,8192"), ("batch", "1,8"), ("tokens", "1,128")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    found = []
    for tokens in map(int, options.tokens.split(",")):
        for batch in map(int, options.batch.split(",")):
            for rows in map(int, options.rows.split(",")):
                found.append(measure(rows, batch, tokens, options.turns, options.threads))
                print(json.dumps(found[-1]), flush=True)
    content = {"threads": options.threads, "onnxruntime": ort.__version__, "rows": found}
    write_atomically(options.output, json.dumps(content, indent=1) + "\n")


def measure(rows: int, batch: int, tokens: int, turns: int, threads: int) -> dict[str, object]:
    """Median CPU milliseconds of a call of every variant, and ratios to the first."""
    variants = {
        "portable": portable(rows, batch, tokens, threads),
        "attend": attend(rows, batch, tokens, threads, np.float32),
        "attend float16": attend(rows, batch, tokens, threads, np.float16),
    }
    if batch == 1 or tokens == 1:  # of more sequences it takes no more than one token
        variants["gqa"] = gqa(rows, batch, tokens, threads)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):  # the first warms up
        for name, run in variants.items():
            calls = 1 + int(2e7 / (rows * batch * tokens * HEADS * DIM))
            started = time.process_time()
            for _ in range(calls):
                run()
            if turn:
                times[name].append(1e3 * (time.process_time() - started) / calls)
    ratios = {
        name: round(statistics.median(a / b for a, b in zip(times[name], times["portable"], strict=True)), 3)
        for name in variants
    }
    milliseconds = {name: round(statistics.median(values), 4) for name, values in times.items()}
    return {"held": rows, "batch": batch, "tokens": tokens, "ms": milliseconds, "ratio": ratios}


def portable(rows: int, batch: int, tokens: int, threads: int) -> Callable[[], None]:
    inputs = [port.name for port in UPDATE.inputs]
    update = helper.make_node(
        UPDATE.name, inputs, ["key_out", "value_out"], domain=DOMAIN, layer=0, plugin_version="1",
        plugin_namespace=NAMESPACE,
    )  # fmt: skip
    attention = helper.make_node("Attention", ["query", "key_out", "value_out", "mask"], ["read"], scale=SCALE)
    values = state(rows, batch, tokens, np.float32)
    for name in ("query", "key_new", "value_new"):
        values[name] = np.ascontiguousarray(values[name].transpose(0, 2, 1, 3))
    row = np.arange(rows + 128)
    mask = row <= rows + np.arange(tokens)[:, None]
    values["mask"] = np.ascontiguousarray(np.broadcast_to(mask, (batch, 1, tokens, rows + 128)))
    return bound([update, attention], values, threads, {"mask": TensorProto.BOOL}, functions=(update_function(),))


def gqa(rows: int, batch: int, tokens: int, threads: int) -> Callable[[], None]:
    node = helper.make_node(
        "GroupQueryAttention",
        ["query", "key_new", "value_new", "key", "value", "last", "total"],
        ["read", "key_out", "value_out"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=SCALE,
    )
    values = state(rows, batch, tokens, np.float32)
    for name in ("query", "key_new", "value_new"):
        values[name] = values[name].reshape(batch, tokens, -1)
    for name in ("length", "plan", "keep"):
        del values[name]
    values["last"] = np.full(batch, rows + tokens - 1, np.int32)
    values["total"] = np.array([rows + tokens], np.int32)
    return bound([node], values, threads)


def attend(rows: int, batch: int, tokens: int, threads: int, cache: type) -> Callable[[], None]:
    node = helper.make_node(
        ATTEND.name,
        [port.name for port in ATTEND.inputs[:8]],
        [port.name for port in ATTEND.outputs],
        domain=DOMAIN,
        layer=0,
        scale=SCALE,
        softcap=0.0,
        window=0,
        kv_heads=KV_HEADS,
        heads="",
    )
    return bound([node], state(rows, batch, tokens, cache), threads, library=True)


def state(rows: int, batch: int, tokens: int, cache: type) -> dict[str, np.ndarray]:
    normal = np.random.default_rng(0).standard_normal
    capacity = rows + 128
    new = {
        name: normal((batch, tokens, heads, DIM), np.float32)
        for name, heads in (("query", HEADS), ("key_new", KV_HEADS), ("value_new", KV_HEADS))
    }
    caches = {name: normal((batch, KV_HEADS, capacity, DIM), np.float32).astype(cache) for name in ("key", "value")}
    plan = {"plan": np.zeros((1, batch, KV_HEADS, capacity), np.int32), "keep": np.full(batch, -1, np.int32)}
    return {**new, "length": np.full(batch, rows, np.int32), **plan, **caches}


def bound(
    nodes: list, values: dict, threads: int, kinds: dict | None = None, functions: tuple = (), library: bool = False
) -> Callable[[], None]:
    """A call of the model of these nodes, its caches updated in place."""
    types = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): HALF, np.dtype(np.int32): INT32}
    info = helper.make_tensor_value_info
    inputs = [info(n, (kinds or {}).get(n) or types[v.dtype], [None] * v.ndim) for n, v in values.items()]
    cache = types[values["key"].dtype]
    outputs = [info("read", FLOAT, None), info("key_out", cache, [None] * 4), info("value_out", cache, [None] * 4)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    opsets = [helper.make_opsetid(*pair) for pair in (("", OPSET), (DOMAIN, 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(find_library()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in values.items():
        held = ort.OrtValue.ortvalue_from_numpy(value)
        binding.bind_ortvalue_input(name, held)
        if name in ("key", "value"):
            binding.bind_ortvalue_output(f"{name}_out", held)
    read = ort.OrtValue.ortvalue_from_shape_and_type(list(values["query"].shape), np.float32)
    binding.bind_ortvalue_output("read", read)
    kept = (values, read)  # what is bound must live
    return lambda: session.run_with_iobinding(binding) or (kept and None)


if __name__ == "__main__":
    main()
