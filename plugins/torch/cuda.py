"""The Triton kernels behind torch.ops.keysieve, for tensors on an NVIDIA GPU."""

import torch
from torch import Tensor

from keysieve.kernels.triton import launch
from keysieve.plugins.torch import in_place, ops


def register(device: str = "cuda") -> None:
    """Let the kernels serve tensors of that device type ("cpu": in Triton's interpreter)."""
    for operation, kernel in KERNELS.items():
        operation.register_kernel(device)(kernel)


def _select_(
    scores: Tensor,
    length: Tensor,
    limit: Tensor,
    budget: Tensor,
    pinned: Tensor,
    plan: Tensor,
    scope: str,
    kv_heads: int,
    sinks: int,
    recent: int,
    utility: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keep, evicted = torch.empty_like(length), torch.empty_like(length)
    launch.select_(scores, length, limit, budget, pinned, plan, keep, evicted, scope, kv_heads, sinks, recent, utility)
    return keep, evicted


def _attend_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor,
    sinks: Tensor | None,
    counters: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    return launch.attend(query, key, value, first, last, sinks, scale, softcap, counters)


KERNELS = {
    ops.update: launch.update,
    ops.score: launch.score,
    ops.select: launch.select,
    ops.attend: launch.attend,
    in_place.update_: launch.update_,
    in_place.score_at: launch.score_at,
    in_place.select_: _select_,
    in_place.attend_at: _attend_at,
}
