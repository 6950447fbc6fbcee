"""carry_states: what layers without attention remember becomes state of the engine, beside the caches.

    x -> causal_conv                      becomes  conv_<i>, x -> cat -> conv1d
    q, k, v -> linear_attention           becomes  q, k, v, recurrent_<i> -> linear_attention

Both states are what the last valid token of each sequence leaves, so padded tokens change nothing.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

import keysieve.plugins.torch.ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.passes.graph import Graph

aten = torch.ops.aten


@dataclass(frozen=True)
class State:
    """One state: float32, input `name` and output `name`_next of shape [B, *shape], zeros at the start of a text."""

    name: str
    shape: tuple[int, ...]


# What a layer of that kind, as a configuration calls it, must hold: all that its tokens know of earlier ones.
ALL = {torch.ops.keysieve.causal_conv.default, torch.ops.keysieve.linear_attention.default}
CARRIERS = {"conv": {torch.ops.keysieve.causal_conv.default}, "linear_attention": ALL, "mamba": ALL, "mamba2": ALL}


def carried_layers(graph: Graph, kinds: dict[int, str]) -> dict[int, str]:
    """The layers, of those of the given kinds, whose states carry_states can carry; by number, with their kinds."""
    held: dict[int, set[object]] = {}
    for operator in set().union(*CARRIERS.values()):
        for node in graph.calls(operator):
            held.setdefault(int(node.args[-1]), set()).add(operator)  # type: ignore[arg-type]
    return {number: kind for number, kind in kinds.items() if held.get(number, set()) >= CARRIERS.get(kind, {None})}


def carry_states(graph: Graph, count: Node) -> list[State]:
    """Add the inputs and outputs of every state. count [B]: how many of a step's tokens are valid."""
    states = []
    for index, node in enumerate(graph.calls(torch.ops.keysieve.causal_conv.default)):
        states.append(_carry_conv(graph, node, f"conv_{index}", count))
    for index, node in enumerate(graph.calls(torch.ops.keysieve.linear_attention.default)):
        states.append(_carry_linear_attention(graph, node, f"recurrent_{index}", count))
    return states


def _carry_conv(graph: Graph, node: Node, name: str, count: Node) -> State:
    """x [B,C,S] with the K - 1 inputs before it."""
    call = graph.call
    x, weight, bias, _ = node.args
    batch, channels, _ = graph.shape(x)  # type: ignore[arg-type]
    width = int(graph.shape(weight)[1]) - 1  # type: ignore[arg-type]
    state = graph.input(name, (batch, channels, width), torch.float32)
    with graph.before(node):
        whole = call(aten.cat.default, [call(aten.to.dtype, state, x.meta["val"].dtype), x], 2)  # type: ignore[union-attr]
        kernel = call(aten.unsqueeze.default, weight, 1)
        result = call(aten.conv1d.default, whole, kernel, bias, [1], [0], [1], channels)
        places = call(aten.add.Tensor, call(aten.unsqueeze.default, count, 1), call(aten.arange.default, width))
        places = call(aten.expand.default, call(aten.unsqueeze.default, places, 1), [-1, channels, -1])
        last = call(aten.to.dtype, call(aten.gather.default, whole, 2, places), torch.float32)
    node.replace_all_uses_with(result)
    graph.fx.erase_node(node)
    graph.outputs[f"{name}_next"] = last
    return State(name, (channels, width))


def _carry_linear_attention(graph: Graph, node: Node, name: str, count: Node) -> State:
    """The state goes through the valid tokens; the others neither decay nor change it."""
    call = graph.call
    query, key, value, decay, rate, _, delta, layer = node.args
    batch, heads, _, key_dim = graph.shape(key)  # type: ignore[arg-type]
    value_dim = graph.shape(value)[3]  # type: ignore[arg-type]
    state = graph.input(name, (batch, heads, key_dim, value_dim), torch.float32)
    with graph.before(node):
        steps = call(aten.arange.default, graph.size(graph.inputs["input_ids"], 1))
        valid = call(aten.lt.Tensor, steps, call(aten.unsqueeze.default, count, 1))  # [B,S]
        valid = call(aten.to.dtype, call(aten.unsqueeze.default, valid, 1), torch.float32)
        decay, rate = (call(aten.mul.Tensor, gate, valid) for gate in (decay, rate))
        new = call(torch.ops.keysieve.linear_attention.default, query, key, value, decay, rate, state, delta, layer)
        read, last = graph.item(new, 0), graph.item(new, 1)
    for user in list(node.users):
        user.replace_all_uses_with(read)
        graph.fx.erase_node(user)
    graph.fx.erase_node(node)
    graph.outputs[f"{name}_next"] = last
    return State(name, (heads, key_dim, value_dim))
