"""find_attention: list every attention node of a captured graph, in layer order, and what each may see.

The model's own mask is evaluated (see mask_span) and replaced by the window or chunk that it was found to be.
"""

import torch
from torch.fx import Node

from keysieve.errors import MatchError
from keysieve.passes.graph import Graph
from keysieve.passes.mask_span import Span, mask_span
from keysieve.passes.result import Attention, Found, Miss


def find_attention(graph: Graph) -> Found[Attention]:
    """Find the `keysieve::attention` nodes (see lower_attention for models that use another attention).

    Raises MatchError where the graph has none.
    """
    found: Found[Attention] = Found([])
    spans: dict[Node, Span | str] = {}
    calls = graph.calls(torch.ops.keysieve.attention.default)
    numbers = [int(node.args[-1]) for node in calls]  # type: ignore[arg-type]
    if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
        numbers = list(range(len(calls)))
    for index, (number, node) in enumerate(zip(numbers, calls, strict=True)):
        query, key, value, sinks, mask, scale, window, chunk, softcap, _ = node.args
        span = Span(int(window), int(chunk))  # type: ignore[arg-type]
        if mask is not None:
            if mask not in spans:
                spans[mask] = mask_span(graph, mask)  # type: ignore[arg-type,index]
            said = spans[mask]  # type: ignore[index]
            if isinstance(said, str):
                found.misses.append(Miss(number, node.name, said))
                continue
            span = Span(min(filter(None, (span.window, said.window)), default=0), said.chunk)
            node.args = (query, key, value, sinks, None, scale, span.window, span.chunk, softcap, number)
        attention = Attention(
            layer=index,
            number=number,
            node=node,
            query=query,  # type: ignore[arg-type]
            key=key,  # type: ignore[arg-type]
            value=value,  # type: ignore[arg-type]
            sinks=sinks,  # type: ignore[arg-type]
            scale=float(scale),  # type: ignore[arg-type]
            window=span.window,
            chunk=span.chunk,
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
    if attention.window and attention.chunk:
        return f"a sliding window of {attention.window} tokens in chunks of {attention.chunk}: one of both is supported"
    return None
