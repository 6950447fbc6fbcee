"""The contract as torch custom ops (`torch.ops.keysieve`): run by the reference kernels, traced by their fakes."""

import torch
from torch import Tensor
from torch.library import custom_op

from keysieve.kernels import reference
from keysieve.plugins.contract import plan_shape


@custom_op("keysieve::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    mask: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    layer: int,
) -> Tensor:
    """Causal attention of one layer, as captured: query [B,Hq,S,D], key/value [B,Hkv,S,D] -> [B,Hq,S,Dv].

    sinks [Hq]: logits of attention sinks; mask [B,1,S,S] bool: what of the causal past is seen, as the model says it
    (find_attention puts window and chunk in its place); window: a token sees itself and window - 1 before it;
    chunk: it sees those of its own chunk, which starts at a multiple of that many tokens; softcap; 0 for none of each.
    """
    if not (window or chunk or softcap or sinks is not None or mask is not None):
        result = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return result.contiguous()  # its strides depend on the kernel that torch chose
    rows = torch.arange(query.shape[2], device=query.device)
    seen = reference.visible(rows[:, None], rows, window, chunk)[None, None]
    if mask is not None:
        seen = seen & mask
    return reference.attend(query, key, value, seen, scale, softcap, sinks).contiguous()


@attention.register_fake
def _(query, key, value, sinks, mask, scale, window, chunk, softcap, layer):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[3])


@custom_op("keysieve::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention over the cache, see keysieve.kernels.reference.attend_rows: query [B,Hq,S,D] -> [B,Hq,S,Dv]."""
    return reference.attend_rows(query, key, value, first, last, scale, softcap, sinks)


@attend.register_fake
def _(query, key, value, first, last, sinks, scale, softcap):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)


@custom_op("keysieve::causal_conv", mutates_args=())
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layer: int) -> Tensor:
    """A convolution of each channel over its past, as captured: x [B,C,S], weight [C,K], bias [C] -> [B,C,S]."""
    past = torch.nn.functional.pad(x, (weight.shape[1] - 1, 0))
    return torch.nn.functional.conv1d(past, weight[:, None], bias, groups=weight.shape[0]).contiguous()


@causal_conv.register_fake
def _(x, weight, bias, layer):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@custom_op("keysieve::linear_attention", mutates_args=())
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor,
    state: Tensor | None,
    delta: int,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """See keysieve.kernels.reference.linear_attention; captured without a state, which is zeros then."""
    if state is None:
        state = query.new_zeros(*key.shape[:2], key.shape[3], value.shape[3], dtype=torch.float32)
    read, last = reference.linear_attention(query, key, value, decay, rate, state, bool(delta))
    return read.contiguous(), last.contiguous()


@linear_attention.register_fake
def _(query, key, value, decay, rate, state, delta, layer):  # type: ignore[no-untyped-def]
    batch, heads, _, key_dim = key.shape
    new = value.new_empty
    return new(value.shape, dtype=torch.float32), new(batch, heads, key_dim, value.shape[3], dtype=torch.float32)


# A run needs no transformers, whose operation captures hold.
grouped_matmul = custom_op("keysieve::grouped_matmul", mutates_args=())(reference.grouped_matmul)


@grouped_matmul.register_fake
def _(rows, weight, ends):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], weight.shape[2])


update = custom_op("keysieve::update", mutates_args=())(reference.update)


@update.register_fake
def _(key_new, value_new, length, plan, keep, key, value, layer):  # type: ignore[no-untyped-def]
    return torch.empty_like(key), torch.empty_like(value)


score = custom_op("keysieve::score", mutates_args=())(reference.score)


@score.register_fake
def _(length, limit, position, centre, weight, keys, policy, query_heads, rotary_dim, interleaved):  # type: ignore[no-untyped-def]
    batch, _, capacity, _ = keys[0].shape
    return keys[0].new_empty(len(keys), batch, query_heads, capacity, dtype=torch.float32)


select = custom_op("keysieve::select", mutates_args=())(reference.select)


@select.register_fake
def _(scores, length, limit, budget, pinned, scope, kv_heads, sinks, recent, utility=None):  # type: ignore[no-untyped-def]
    layers, batch, _, capacity = scores.shape
    shape = plan_shape(scope, layers, batch, kv_heads, capacity)
    new = scores.new_empty
    return new(shape, dtype=torch.int32), new(batch, dtype=torch.int32), new(batch, dtype=torch.int32)
