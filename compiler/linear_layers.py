"""What capture does to layers without attention: each function that mixes tokens becomes one node of the graph.

Transformers calls them by the names that their libraries gave them (causal-conv1d, flash-linear-attention, mamba-ssm),
as functions of a model's module or as attributes of a layer. Left alone, their loops over chunks would be unrolled.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_layer = -1  # the number of the layer that is being traced


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, **_: Any
) -> torch.Tensor:
    """causal_conv1d_fn: x [B,C,S], weight [C,K] -> [B,C,S]."""
    result = torch.ops.keysieve.causal_conv(x, weight, bias, _layer)
    if activation is None:
        return result
    from transformers.activations import ACT2FN

    return ACT2FN[activation](result)


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """chunk_gated_delta_rule: query and key [B,S,H,Dk], value [B,S,Hv,Dv], g and beta [B,S,Hv] -> [B,S,Hv,Dv]."""
    group = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(group, 2) if group > 1 else x for x in (query, key))
    by_head = [x.transpose(1, 2).float() for x in (query, key, value, g, beta)]
    query, key, values, decay, rate = by_head
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    read, _state = torch.ops.keysieve.linear_attention(query, key, values, decay, rate, None, 1, _layer)
    return read.transpose(1, 2).to(value.dtype), None


def state_space(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *_: Any,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    **__: Any,
) -> torch.Tensor:
    """mamba_chunk_scan_combined: x [B,S,H,P], dt [B,S,H], A and D [H], B and C [B,S,G,N] -> [B,S,H,P] float32."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = functional.softplus(dt) if dt_softplus else dt
    dt = dt.clamp(dt_limit[0], None if dt_limit[1] == inf else dt_limit[1]).float()
    x, group = x.float(), x.shape[2] // B.shape[2]
    key, query = (side.float().repeat_interleave(group, 2).transpose(1, 2) for side in (B, C))
    decay = (A.float() * dt).transpose(1, 2)
    value = (x * dt[..., None]).transpose(1, 2)
    rate = torch.ones_like(decay)
    read, _state = torch.ops.keysieve.linear_attention(query, key, value, decay, rate, None, 0, _layer)
    read = read.transpose(1, 2)
    return read if D is None else read + D[:, None] * x


REPLACED: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv,
    "chunk_gated_delta_rule": delta_rule,
    "torch_chunk_gated_delta_rule": delta_rule,
    "mamba_chunk_scan_combined": state_space,
    "mamba2_chunk_scan": state_space,
}


@contextmanager
def explicit_linear_layers(model: nn.Module) -> Iterator[None]:
    """Put the functions above in place of the model's own, and keep account of the layer that is traced."""
    owners: list[Any] = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    owners += list(model.modules())
    changed = [(owner, name, vars(owner)[name]) for owner in owners for name in REPLACED if name in vars(owner)]
    hooks = [
        module.register_forward_pre_hook(_enter)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    try:
        for owner, name, _ in changed:
            vars(owner)[name] = REPLACED[name]
        yield
    finally:
        for owner, name, before in changed:
            vars(owner)[name] = before
        for hook in hooks:
            hook.remove()


def _enter(module: nn.Module, _: Any) -> None:
    global _layer
    _layer = int(module.layer_idx)  # type: ignore[arg-type]
