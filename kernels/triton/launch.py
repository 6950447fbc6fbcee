"""Run the kernels on tensors with the reference's signatures: on a GPU, or on a CPU in Triton's interpreter.

Used by tests and benchmarks. An engine launches the same variants from its C++ plugin.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.kernels.triton.variants import Variant, variants


def score(
    model: KernelConfiguration,
    length: Tensor,
    limit: Tensor,
    position: Tensor,
    centre: Tensor,
    weight: Tensor,
    keys: Sequence[Tensor],
) -> Tensor:
    """Scores [L, B, Hq, C] as the reference's; NaN where the kernel has nothing to write."""
    batch, _, capacity, _ = keys[0].shape
    device = keys[0].device
    addresses = torch.tensor([key.data_ptr() for key in keys], device=device)
    shape = (model.layers, batch, model.query_heads, capacity)
    scores = torch.full(shape, float("nan"), dtype=torch.float32, device=device)
    arguments = (addresses, centre, weight, length, limit, position, scores, batch, capacity)
    _run(variants(model)["score"], batch, capacity, arguments)
    return scores


def select(
    model: KernelConfiguration, scores: Tensor, length: Tensor, limit: Tensor, budget: Tensor, pinned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """plan [Lp, B, Hp, C], keep [B] and evicted [B] as the reference's; the plan is -1 where not written."""
    batch, capacity = scores.shape[1], scores.shape[3]
    stats = torch.empty(*scores.shape[:3], 4, dtype=torch.float32, device=scores.device)
    plan_shape = (model.plan_layers, batch, model.plan_heads, capacity)
    ranks = torch.empty(plan_shape, dtype=torch.uint32, device=scores.device)
    plan = torch.full(plan_shape, -1, dtype=torch.int32, device=scores.device)
    keep, evicted = torch.empty_like(length), torch.empty_like(length)
    of = variants(model)
    _run(of["select_stats"], batch, capacity, (scores, length, limit, pinned, stats, batch, capacity))
    arguments = (scores, stats, length, limit, budget, pinned, ranks, plan, keep, evicted, batch, capacity)
    _run(of["select_plan"], batch, capacity, arguments)
    return plan, keep, evicted


def update(
    model: KernelConfiguration,
    key_new: Tensor,
    value_new: Tensor,
    length: Tensor,
    plan: Tensor,
    keep: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
) -> None:
    """Changes `key` and `value` in place to what the reference returns."""
    batch, _, capacity, _ = key.shape
    tensors = (key_new, value_new, length, plan, keep, key, value)
    numbers = (batch, capacity, key_new.shape[2], plan.shape[0], layer)
    _run(variants(model)["update"], batch, capacity, (*tensors, *numbers))


def _run(variant: Variant, batch: int, capacity: int, arguments: tuple) -> None:
    grid = variant.grid.of(batch, capacity)
    variant.kernel[grid](*arguments, **variant.constants, num_warps=variant.num_warps, num_stages=1)
