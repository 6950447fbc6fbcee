"""lower_attention: bring attention written with scaled_dot_product_attention or matmul-softmax-matmul to one form.

    q, repeat_kv(k), repeat_kv(v), mask -> scaled_dot_product_attention
    q @ k.T * scale + mask -> softmax -> @ v
become
    q, k, v -> keysieve::attention

Both only if the mask, evaluated on real positions, is the causal one.
"""

from keysieve.passes.graph import Graph


def lower_attention(graph: Graph) -> None:
    """Rewrite SDPA and eager attention in place; a graph that has keysieve::attention already is left alone."""
