"""Random inputs of the three nodes, for a number of sequences that are due."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.sizes import Shape


@dataclass
class Inputs:
    """As the contract names them; keys and values of all layers."""

    length: Tensor
    limit: Tensor
    budget: Tensor
    pinned: Tensor
    position: Tensor
    centre: Tensor
    weight: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    key_new: Tensor
    value_new: Tensor

    def score(self, limit: Tensor | None = None) -> tuple[object, ...]:
        return self.length, self.limit if limit is None else limit, self.position, self.centre, self.weight, self.keys

    def select(self, scores: Tensor, limit: Tensor | None = None) -> tuple[object, ...]:
        return scores, self.length, self.limit if limit is None else limit, self.budget, self.pinned


def random_inputs(
    shape: Shape, batch: int, device: torch.device, rotary_dim: int | None = None, offsets: int = 1, value_dim: int = 0
) -> Inputs:
    """All sequences hold shape.rows rows, which is their limit."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype, heads = getattr(torch, shape.dtype), (shape.layers, batch, shape.query_heads)
    rotary_dim, value_dim = shape.head_dim if rotary_dim is None else rotary_dim, value_dim or shape.head_dim

    def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    def rows(count: int, width: int) -> Tensor:
        return normal(batch, shape.kv_heads, count, width, dtype=dtype)

    def all_are(number: int) -> Tensor:
        return torch.full((batch,), number, dtype=torch.int32, device=device)

    return Inputs(
        length=all_are(shape.rows),
        limit=all_are(shape.rows),
        budget=all_are(shape.budget),
        pinned=all_are(0),
        position=all_are(shape.rows).long(),
        centre=normal(*heads, offsets, shape.head_dim),
        weight=normal(*heads, rotary_dim // 2).abs(),
        keys=[rows(shape.capacity, shape.head_dim) for _ in range(shape.layers)],
        values=[rows(shape.capacity, value_dim) for _ in range(shape.layers)],
        key_new=rows(1, shape.head_dim),
        value_new=rows(1, value_dim),
    )
