"""Attention while decoding, against a copy of the keys and values held, and against torch's own attention."""

from typing import Any

import torch

from gpu.place import Place
from gpu.sizes import BATCHES, HISTORIES, QWEN3_8B, TINY, Shape
from keysieve.kernels.reference import attend_rows
from keysieve.kernels.triton.launch import attend

MOST_BYTES = 20e9  # of keys and values of one layer and its copies
CHUNK = 512


def run(place: Place) -> None:
    shape, batches, histories = (TINY, (2,), (40,)) if place.tiny else (QWEN3_8B, BATCHES, HISTORIES)
    for batch in batches:
        for rows in histories:
            if batch * rows * shape.row_bytes() / shape.layers * 3 < MOST_BYTES:
                place.attempt(
                    "attention", lambda b=batch, r=rows: decoding(place, shape, b, r), tokens=1, batch=batch, rows=rows
                )
    tokens, rows = (5, 40) if place.tiny else (CHUNK, QWEN3_8B.rows)
    place.attempt("attention", lambda: chunk(place, shape, tokens, rows), tokens=tokens, batch=1, rows=rows)


def tensors(place: Place, shape: Shape, batch: int, tokens: int, rows: int) -> tuple[torch.Tensor, ...]:
    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=place.device, dtype=getattr(torch, shape.dtype))

    query = normal(batch, tokens, shape.query_heads, shape.head_dim).transpose(1, 2)
    key, value = (normal(batch, shape.kv_heads, rows, shape.head_dim) for _ in range(2))
    last = torch.arange(rows - tokens, rows, device=place.device).expand(batch, -1).contiguous()
    return query, key, value, last


def decoding(place: Place, shape: Shape, batch: int, rows: int) -> dict[str, object]:
    query, key, value, last = tensors(place, shape, batch, 1, rows)
    scale = shape.head_dim**-0.5

    def ours() -> torch.Tensor:
        return attend(query, key, value, None, last, None, scale, 0.0)

    def torchs(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)

    moved = key.nbytes + value.nbytes
    measured = {"keysieve": place.microseconds(ours), "torch": place.microseconds(lambda: torchs(key, value))}
    # A cache as long as it may become, of which the same rows are held.
    long_key, long_value = (torch.cat([cache, torch.full_like(cache, torch.nan)], 2) for cache in (key, value))
    measured["keysieve, capacity twice the rows"] = place.microseconds(
        lambda: attend(query, long_key, long_value, None, last, None, scale, 0.0)
    )
    measured["copy of the bytes"] = place.copying(moved)
    return {
        "us": {name: round(time, 1) for name, time in measured.items()},
        "MB": round(moved / 1e6, 1),
        "of_copy_bandwidth": round(measured["copy of the bytes"] / measured["keysieve"], 3),
        "error": error(ours(), query, key, value, last, scale),
    }


def chunk(place: Place, shape: Shape, tokens: int, rows: int) -> dict[str, object]:
    query, key, value, last = tensors(place, shape, 1, tokens, rows)
    scale = shape.head_dim**-0.5
    mask = (torch.arange(rows, device=place.device) <= last[..., None])[:, None]

    def ours() -> torch.Tensor:
        return attend(query, key, value, None, last, None, scale, 0.0)

    def torchs() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    measured = {"keysieve": place.microseconds(ours), "torch": place.microseconds(torchs)}
    return {
        "us": {name: round(time, 1) for name, time in measured.items()},
        "error": error(ours(), query, key, value, last, scale),
    }


def error(found: torch.Tensor, *given: Any) -> float:
    """Of the first sequence, beside the reference in float64."""
    *tensors, last, scale = given
    wanted = attend_rows(*(tensor[:1].double() for tensor in tensors), None, last[:1], scale)
    return float((found[:1].double() - wanted).norm() / wanted.norm())
