"""KeySieveScore as an ONNX function, made for a model's layers and heads; idle unless a sequence is due."""

import numpy as np

from keysieve.plugins.onnx.body import FLOAT, INT64, Body, Branch


def score_body(
    layers: int, query_heads: int, kv_heads: int, policy: str, rotary_dim: int, interleaved: bool, rows: int
) -> Body:
    """Inputs key_0 ... key_{L-1} and as in contract.SCORE; `rows` is J. Output scores [L,B,Hq,C]."""
    b = Body()
    due = b.ReduceMax(b.Cast(b.GreaterOrEqual("length", "limit"), to=INT64), keepdims=0)
    then = Branch("due_")
    parts = []
    for layer in range(layers):
        if policy == "trig":
            scores = _trig(then, layer, query_heads, kv_heads, rotary_dim, interleaved, rows)
        elif policy == "key_norm":
            scores = then.Neg(then.ReduceL2(_key(then, layer), [3], keepdims=0))  # [B,Hkv,C]
            scores = _repeat_heads(then, scores, query_heads, kv_heads)
        elif policy == "streaming":
            scores = _shaped(then, then.Cast(_row_index(then), to=FLOAT), query_heads)
        elif policy == "random":
            scores = _random(then, layer, query_heads)
        else:
            raise ValueError(f"no ONNX body for score policy {policy!r}")
        parts.append(then.Unsqueeze(scores, [0]))
    then.give(then.Concat(*parts, axis=0), FLOAT)
    idle = Branch("idle_")
    shape = idle.Concat([layers], idle.size("key_0", 0), [query_heads], idle.size("key_0", 2), axis=0)
    idle.give(idle.Expand(0.0, shape), FLOAT)
    b.rename(b.condition(b.Greater(due, 0), then, idle), "scores")
    return b


def _key(b: Body, layer: int) -> str:
    return str(b.Cast(f"key_{layer}", to=FLOAT))


def _trig(b: Body, layer: int, query_heads: int, kv_heads: int, rotary_dim: int, interleaved: bool, rows: int) -> str:
    """[B,Hq,C]: max over J of <centre_j, k>, plus the weighted magnitudes of the bands."""
    group = query_heads // kv_heads
    key = _key(b, layer)  # [B,Hkv,C,D]
    centre = b.Gather("centre", layer, axis=0)  # [B,Hq,J,D]
    centre = b.Reshape(centre, [0, kv_heads, group * rows, -1])
    dot = b.MatMul(key, b.Transpose(centre, perm=[0, 1, 3, 2]))  # [B,Hkv,C,G*J]
    if rows > 1:
        dot = b.ReduceMax(b.Reshape(dot, [0, 0, 0, group, rows]), [4], keepdims=0)
    if interleaved:
        pairs = b.Reshape(b.Slice(key, [0], [rotary_dim], [3]), [0, 0, 0, rotary_dim // 2, 2])
        magnitude = b.ReduceL2(pairs, [4], keepdims=0)
    else:
        real = b.Slice(key, [0], [rotary_dim // 2], [3])
        imaginary = b.Slice(key, [rotary_dim // 2], [rotary_dim], [3])
        magnitude = b.Sqrt(b.Add(b.Mul(real, real), b.Mul(imaginary, imaginary)))  # [B,Hkv,C,R/2]
    weight = b.Reshape(b.Gather("weight", layer, axis=0), [0, kv_heads, group, -1])
    norm = b.MatMul(magnitude, b.Transpose(weight, perm=[0, 1, 3, 2]))
    scores = b.Transpose(b.Add(dot, norm), perm=[0, 1, 3, 2])  # [B,Hkv,G,C]
    return str(b.Reshape(scores, [0, query_heads, -1]))


def _repeat_heads(b: Body, scores: str, query_heads: int, kv_heads: int) -> str:
    """[B,Hkv,C] -> [B,Hq,C]."""
    batch, capacity = b.size(scores, 0), b.size(scores, 2)
    shape = b.Concat(batch, [kv_heads, query_heads // kv_heads], capacity, axis=0)
    return str(b.Reshape(b.Expand(b.Unsqueeze(scores, [2]), shape), [0, query_heads, -1]))


def _row_index(b: Body) -> str:
    return str(b.Range(0, b.Squeeze(b.size("key_0", 2), [0]), 1))


def _shaped(b: Body, scores: str, query_heads: int) -> str:
    """Anything that broadcasts -> [B,Hq,C]."""
    return str(b.Expand(scores, b.Concat(b.size("key_0", 0), [query_heads], b.size("key_0", 2), axis=0)))


def _random(b: Body, layer: int, query_heads: int) -> str:
    """The hash of kernels/reference/score.py."""
    start = b.Unsqueeze(b.Mul(b.Mod("position", 4093), 1009), [1, 2])
    heads = np.arange(query_heads, dtype=np.int64)[:, None] * 31 + layer * 17
    x = b.Mod(b.Add(b.Add(start, b.Mul(_row_index(b), 1013)), heads), 65521)
    for _ in range(2):
        x = b.Mod(b.Add(b.Mul(x, x), 12289), 65521)
    return _shaped(b, b.Div(b.Cast(x, to=FLOAT), 65521.0), query_heads)
