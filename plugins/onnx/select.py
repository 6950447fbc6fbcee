"""KeySieveSelect as an ONNX function, made for a scope; the plan is computed only if a sequence is due."""

import numpy as np

from keysieve.plugins.contract import plan_shape
from keysieve.plugins.onnx.body import FLOAT, INT32, INT64, Body, Branch

NONE = np.int32(-1)


def select_body(layers: int, kv_heads: int, scope: str, sinks: int, recent: int, utility: bool = False) -> Body:
    """Inputs and outputs as in contract.SELECT; utility: whether that input is there."""
    b = Body()
    is_due = b.GreaterOrEqual("length", "limit")
    kept = b.Min("budget", "length")
    b.rename(b.Where(is_due, kept, NONE), "keep")
    b.rename(b.Where(is_due, b.Sub("length", kept), np.int32(0)), "evicted")
    any_due = b.Greater(b.ReduceMax(b.Cast(is_due, to=INT64), keepdims=0), 0)
    lp, _, hp, _ = plan_shape(scope, layers, None, kv_heads, None)
    then = Branch("due_")
    then.give(_plan(then, kept, kv_heads, scope, sinks, recent, utility), INT32)
    idle = Branch("idle_")
    shape = idle.Concat([lp], idle.size("scores", 1), [hp], idle.size("scores", 3), axis=0)
    idle.give(idle.Expand(np.int32(0), shape), INT32)
    b.rename(b.condition(any_due, then, idle), "plan")
    return b


def _plan(b: Body, kept: str, kv_heads: int, scope: str, sinks: int, recent: int, utility: bool) -> str:
    capacity = b.size("scores", 3)
    rows64 = b.Range(0, b.Squeeze(capacity, [0]), 1)
    rows = b.Cast(rows64, to=INT32)
    length = b.Unsqueeze("length", [1])
    front = b.Unsqueeze(b.Max("pinned", np.int32(sinks)), [1])
    held = b.Less(rows, length)  # [B,C]
    ends = b.Or(b.Less(rows, front), b.GreaterOrEqual(rows, b.Sub(length, np.int32(recent))))
    protected = b.And(held, ends)
    candidate = b.Unsqueeze(b.And(held, b.Not(ends)), [0, 2])  # [1,B,1,C]

    z = _standardise(b, candidate)  # [L,B,Hq,C]
    a = b.ReduceMax(b.Reshape(z, b.Concat([0, 0, kv_heads, -1], capacity, axis=0)), [3], keepdims=0)
    if utility:
        a = b.Add(a, b.Reshape("utility", b.Shape(a)))
        a = b.Where(b.Or(b.IsNaN(a), b.IsInf(a)), np.float32(-np.inf), a)
    if scope == "per_head":
        a = b.ReduceMean(a, [0], keepdims=1)
    elif scope == "union":
        a = b.ReduceMax(a, [0, 2], keepdims=1)
    ranked_by = b.Where(b.Unsqueeze(protected, [0, 2]), np.float32(np.inf), a)  # [Lp,B,Hp,C]

    # TopK prefers the lower index among equals, as the contract asks for.
    _, best_first = b.TopK(ranked_by, capacity, axis=3, outputs=2)
    chosen = b.Less(rows, b.Unsqueeze(kept, [1, 2]))  # [B,1,C]
    last = b.Squeeze(capacity, [0])
    ascending, _ = b.TopK(b.Where(chosen, best_first, last), capacity, axis=3, largest=0, outputs=2)
    return str(b.Cast(b.Where(chosen, ascending, 0), to=INT32))


def _standardise(b: Body, candidate: str) -> str:
    """z-score over the finite candidates of each head; -inf elsewhere."""
    finite = b.Not(b.Or(b.IsNaN("scores"), b.IsInf("scores")))
    usable = b.And(candidate, finite)
    count = b.Max(b.ReduceSum(b.Cast(usable, to=FLOAT), [3]), 1.0)
    # Relative to the highest, so that equal scores give a mean of exactly 0 whatever their size.
    highest = b.ReduceMax(b.Where(usable, "scores", np.float32(-np.inf)), [3])
    scores = b.Where(usable, b.Sub("scores", highest), 0.0)
    mean = b.Div(b.ReduceSum(scores, [3]), count)
    centred = b.Where(usable, b.Sub(scores, mean), 0.0)
    std = b.Sqrt(b.Div(b.ReduceSum(b.Mul(centred, centred), [3]), count))
    z = b.Div(centred, b.Max(std, 1e-6))
    usable = b.And(usable, b.Not(b.Or(b.IsNaN(z), b.IsInf(z))))
    return str(b.Where(usable, z, np.float32(-np.inf)))
