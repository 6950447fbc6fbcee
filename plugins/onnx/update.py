"""KeySieveUpdate as an ONNX function: one ScatterND a cache, so that a runtime can work in place.

The rows that the plan keeps are gathered first (none, when nothing is planned), then written together with the new
rows. ScatterND is the only node that turns the cache input into the cache output: bound to one buffer, nothing is
copied. Sequences that compact nothing take part with rows that stay where they are.
"""

import numpy as np

from keysieve.plugins.onnx.body import INT64, Body


def update_body() -> Body:
    """Inputs and outputs as in contract.UPDATE."""
    b = Body()
    planned = b.GreaterOrEqual("keep", np.int32(0))
    start = b.Unsqueeze(b.Cast(b.Where(planned, "keep", "length"), to=INT64), [1])  # [B,1]
    # [M]: the rows that any sequence of the batch compacts to; M = 0 on most steps
    most = b.Cast(b.Max(b.ReduceMax("keep", keepdims=0), np.int32(0)), to=INT64)
    rows = b.Range(0, most, 1)

    layer = b.Min(b.Reshape(b.attribute("layer"), [1]), b.Sub(b.size("plan", 0), [1]))
    plan = b.Slice("plan", layer, b.Add(layer, [1]), [0])
    plan = b.Slice(b.Squeeze(plan, [0]), [0], b.Reshape(most, [1]), [2])  # [B,Hp,M]
    source = b.Where(b.Unsqueeze(planned, [1, 2]), b.Cast(plan, to=INT64), rows)
    batch_heads = b.Shape("key", start=0, end=2)
    source = b.Expand(source, b.Concat(batch_heads, b.Reshape(most, [1]), axis=0))  # [B,Hkv,M]
    source = b.Unsqueeze(source, [3])

    # A row m past a sequence's own kept rows goes behind its new rows, where nothing is held.
    tokens = b.size("key_new", 2)
    kept_to = b.Where(b.Less(rows, start), rows, b.Add(rows, tokens))  # [B,M]
    new_to = b.Add(start, b.Range(0, b.Squeeze(tokens, [0]), 1))  # [B,S]
    target = b.Unsqueeze(b.Concat(kept_to, new_to, axis=1), [1, 3])  # [B,1,M+S,1]
    shape = b.Concat(batch_heads, b.size(target, 2), [1], axis=0)
    batch = b.Range(0, b.Squeeze(b.size("key", 0), [0]), 1)
    heads = b.Range(0, b.Squeeze(b.size("key", 1), [0]), 1)
    target = b.Concat(
        b.Expand(b.Unsqueeze(batch, [1, 2, 3]), shape),
        b.Expand(b.Unsqueeze(heads, [0, 2, 3]), shape),
        b.Expand(target, shape),
        axis=3,
    )
    for cache in ("key", "value"):
        kept = b.GatherND(cache, source, batch_dims=2)
        moved = b.Concat(kept, f"{cache}_new", axis=2)  # [B,Hkv,M+S,D]
        b.rename(b.ScatterND(cache, target, moved), f"{cache}_out")
    return b
