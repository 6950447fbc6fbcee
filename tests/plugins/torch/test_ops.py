"""Every torch op does what its schema and its fake say, in torch's own check: no alias, and the fake's strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef, opcheck

from keysieve.plugins.torch import in_place, ops

BATCH, TOKENS, ROWS, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 2, 3, 8, 4, 2, 6, 5
Arguments = tuple[Any, ...]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


def by_token(*shape: int) -> Tensor:
    """[B,S,H,D] seen as [B,H,S,D], as the projections of a model give it."""
    batch, heads, tokens, width = shape
    return floats(batch, tokens, heads, width).transpose(1, 2)


def integers(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def captured(mask: bool = False, sinks: bool = False, softcap: float = 0.0, window: int = 0) -> Arguments:
    query, key = by_token(BATCH, HEADS, TOKENS, WIDTH), by_token(BATCH, KV_HEADS, TOKENS, WIDTH)
    value = by_token(BATCH, KV_HEADS, TOKENS, VALUE_WIDTH)
    seen = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool) if mask else None
    return query, key, value, floats(HEADS) if sinks else None, seen, 0.5, window, 0, softcap, 0


def attend(first: bool, sinks: bool, softcap: float) -> Arguments:
    query, (key, value) = by_token(BATCH, HEADS, TOKENS, WIDTH), caches()
    last = torch.arange(TOKENS).expand(BATCH, TOKENS) + 2
    return query, key, value, last - 1 if first else None, last, floats(HEADS) if sinks else None, 0.5, softcap


def attend_at() -> Arguments:
    *tensors, scale, softcap = attend(True, False, 0.0)
    return *tensors, torch.zeros(in_place.COUNTERS, dtype=torch.int32), scale, softcap


def caches(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return floats(BATCH, KV_HEADS, ROWS, WIDTH, dtype=dtype), floats(BATCH, KV_HEADS, ROWS, VALUE_WIDTH, dtype=dtype)


def plan() -> Tensor:
    return torch.arange(ROWS, dtype=torch.int32).expand(1, BATCH, KV_HEADS, ROWS).contiguous()


def update(dtype: torch.dtype = torch.float32) -> Arguments:
    """One sequence is compacted first, the other is not."""
    new = by_token(BATCH, KV_HEADS, TOKENS, WIDTH), by_token(BATCH, KV_HEADS, TOKENS, VALUE_WIDTH)
    return *(x.to(dtype) for x in new), integers(5, 4), plan(), integers(3, -1), *caches(dtype), 0


def score(due: int) -> Arguments:
    """due: how many of the sequences are."""
    centre, weight = floats(1, BATCH, HEADS, 1, WIDTH), floats(1, BATCH, HEADS, WIDTH // 2)
    limit = integers(*[4] * due, *[ROWS] * (BATCH - due))
    position = integers(9, 9, dtype=torch.int64)
    return integers(5, 5), limit, position, centre, weight, [caches()[0]], "trig", HEADS, WIDTH, 0


def score_at() -> Arguments:
    *given, keys, policy, heads, width, interleaved = score(1)
    addresses = integers(*(key.data_ptr() for key in keys), dtype=torch.int64)
    return *given, keys, addresses, policy, heads, width, interleaved


def select(scope: str, due: int = 1) -> Arguments:
    limit = integers(*[4] * due, *[ROWS] * (BATCH - due))
    return floats(1, BATCH, HEADS, ROWS), integers(6, 5), limit, integers(3, 3), integers(0, 0), scope, KV_HEADS, 1, 1


def select_() -> Arguments:
    *tensors, scope, kv_heads, sinks, recent = select("per_head")
    return *tensors, plan(), scope, kv_heads, sinks, recent


def recurrent(state: bool, delta: int) -> Arguments:
    query, key = by_token(BATCH, HEADS, TOKENS, WIDTH), by_token(BATCH, HEADS, TOKENS, WIDTH)
    gates = (-floats(BATCH, TOKENS, HEADS).abs().transpose(1, 2), floats(BATCH, TOKENS, HEADS).transpose(1, 2))
    before = floats(BATCH, HEADS, VALUE_WIDTH, WIDTH).transpose(2, 3) if state else None
    return query, key, by_token(BATCH, HEADS, TOKENS, VALUE_WIDTH), *gates, before, delta, 0


def conv(bias: bool) -> Arguments:
    x = floats(BATCH, TOKENS, HEADS).transpose(1, 2)
    return x, floats(HEADS, 4), floats(HEADS) if bias else None, 0


CASES: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "attention": ("attention", captured),
    "attention, mask": ("attention", lambda: captured(mask=True)),
    "attention, window": ("attention", lambda: captured(window=2)),
    "attention, softcap and sinks": ("attention", lambda: captured(sinks=True, softcap=5.0)),
    "attend": ("attend", lambda: attend(False, False, 0.0)),
    "attend, window": ("attend", lambda: attend(True, False, 0.0)),
    "attend, softcap and sinks": ("attend", lambda: attend(True, True, 5.0)),
    "causal_conv": ("causal_conv", lambda: conv(False)),
    "causal_conv, bias": ("causal_conv", lambda: conv(True)),
    "linear_attention": ("linear_attention", lambda: recurrent(False, 0)),
    "linear_attention, state": ("linear_attention", lambda: recurrent(True, 0)),
    "linear_attention, delta": ("linear_attention", lambda: recurrent(True, 1)),
    "grouped_matmul": ("grouped_matmul", lambda: (floats(5, WIDTH), floats(3, WIDTH, VALUE_WIDTH), integers(2, 2, 5))),
    "update": ("update", update),
    "update, bfloat16": ("update", lambda: update(torch.bfloat16)),
    "score, none due": ("score", lambda: score(0)),
    "score, one due": ("score", lambda: score(1)),
    "select, none due": ("select", lambda: select("union", 0)),
    **{f"select, {scope}": ("select", lambda s=scope: select(s)) for scope in ("union", "per_head")},
    "select, per_layer_per_head": ("select", lambda: select("per_layer_per_head")),
    "update_": ("update_", update),
    "attend_at": ("attend_at", attend_at),
    "score_at": ("score_at", score_at),
    "select_": ("select_", select_),
}


def test_every_op_is_checked() -> None:
    defined = [value for module in (ops, in_place) for value in vars(module).values()]
    names = {op._qualname for op in defined if isinstance(op, CustomOpDef)}
    assert names == {f"keysieve::{name}" for name, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_op_is_as_declared(case: str) -> None:
    name, arguments = CASES[case]
    opcheck(getattr(torch.ops.keysieve, name).default, arguments())
