"""find_attention: list every attention node of a captured graph, in layer order."""

import torch

from keysieve.errors import MatchError
from keysieve.passes.graph import Graph
from keysieve.passes.result import Attention, Found, Miss


def find_attention(graph: Graph) -> Found[Attention]:
    """Find the `keysieve::attention` nodes (see lower_attention for models that use another attention).

    Raises MatchError where the graph has none.
    """
    found: Found[Attention] = Found([])
    calls = graph.calls(torch.ops.keysieve.attention.default)
    numbers = [int(node.args[-1]) for node in calls]  # type: ignore[arg-type]
    if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
        numbers = list(range(len(calls)))
    for index, (number, node) in enumerate(zip(numbers, calls, strict=True)):
        query, key, value, sinks, scale, window, softcap, _ = node.args
        attention = Attention(
            layer=index,
            number=number,
            node=node,
            query=query,  # type: ignore[arg-type]
            key=key,  # type: ignore[arg-type]
            value=value,  # type: ignore[arg-type]
            sinks=sinks,  # type: ignore[arg-type]
            scale=float(scale),  # type: ignore[arg-type]
            window=int(window),  # type: ignore[arg-type]
            softcap=float(softcap),  # type: ignore[arg-type]
        )
        reason = _unsupported(attention)
        if reason:
            found.misses.append(Miss(number, node.name, reason))
        else:
            found.matches.append(attention)
    if not found.matches and not found.misses:
        raise MatchError(
            "no attention was found in the captured graph: neither transformers' AttentionInterface, "
            "scaled_dot_product_attention nor matmul-softmax-matmul; keysieve needs a decoder with attention"
        )
    return found


def _unsupported(attention: Attention) -> str | None:
    if attention.query_heads % attention.kv_heads:
        return f"{attention.query_heads} query heads are not a multiple of {attention.kv_heads} KV heads"
    if attention.window:
        return f"sliding window of {attention.window} tokens: not supported yet (only full attention evicts)"
    if attention.softcap:
        return f"attention softcap {attention.softcap}: not supported yet"
    if attention.sinks is not None:
        return "attention-sink logits: not supported yet"
    return None
