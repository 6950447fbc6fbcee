"""insert_gates: what every row is worth as its gate foretells it, kept beside keys and values.

    h [B,S,d] -> h W + b -> utility of the new rows -> update -> utility_next -> select
                            positions of the new rows -^

A gate (`keysieve calibrate`) foretells from the hidden state how much attention a key will get at most, in nats, before
anybody has asked for it. The caches of a group keep these numbers as a cache of their own, with rows of one number: its
"keys" are utilities and its "values" absolute positions, its batch is layers x sequences. So `update` compacts and
appends them like any other rows. Sources: KVzip (arXiv 2505.23416), KVzap (arXiv 2601.07891).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Node

from keysieve.errors import MatchError
from keysieve.passes.find_inputs import inputs_or_misses
from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group
from keysieve.passes.insert_cache import Cache, class_suffixes
from keysieve.passes.result import Attention
from keysieve.plugins.contract import ROW_STATES

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """u = weight h + bias of every KV head of a layer; weight [Hkv,d], bias [Hkv]."""

    weight: np.ndarray
    bias: np.ndarray


def gate_inputs(graph: Graph, attentions: list[Attention]) -> dict[int, Node]:
    """What the gate of every layer reads. Raises MatchError where a layer has nothing that one could read."""
    found = inputs_or_misses(graph, attentions)
    for miss in found.misses:
        raise MatchError(f"this model can have no gates: {miss}; choose --terms trig")
    return dict(found.matches)


def check_gates(attentions: list[Attention], gates: Mapping[int, Gate]) -> None:
    """Raises MatchError where a layer has no gate."""
    for attention in attentions:
        if attention.layer not in gates:
            raise MatchError(f"layer {attention.number} has no gate; learn gates with `keysieve calibrate`")


def insert_gates(
    graph: Graph, cache: Cache, groups: list[Group], hidden: Mapping[int, Node], gates: Mapping[int, Gate]
) -> list[Node]:
    """Add the inputs utility<suffix> and token<suffix> [L*B,Hkv,C,1] float32 of every group; outputs end in _next.

    hidden: the node h of every layer that evicts, gates: by layer. Returns the utility of the rows held by group.
    """
    call = graph.call
    classes = class_suffixes(groups)
    pairs = [(layer, head) for layer in hidden for head in range(len(gates[layer].bias))]
    heads = {pair: index for index, pair in enumerate(pairs)}
    with graph.before(graph.output_node):
        found = [_product(graph, hidden[layer], gates[layer].weight) for layer in hidden]
        bias = np.concatenate([gates[layer].bias for layer in hidden]).astype(np.float32)
        every = call(aten.add.Tensor, call(aten.cat.default, found, 2), graph.constant("gate_bias", _float(bias)))
        tokens = graph.size(graph.inputs["input_ids"], 1)
        positions = call(aten.to.dtype, cache.positions, torch.float32)  # exact up to 2^24
        positions = call(aten.reshape.default, positions, [1, -1, 1, tokens])
    return [_group(graph, group, classes[group.head_class], heads, every, positions, tokens) for group in groups]


def _product(graph: Graph, hidden: Node, weight: np.ndarray) -> Node:
    """h W [B,S,Hkv], float32; W in the dtype of h."""
    matrix = graph.constant("gate", _float(weight).to(hidden.meta["val"].dtype))
    return graph.call(aten.to.dtype, graph.call(aten.linear.default, hidden, matrix), torch.float32)


def _group(
    graph: Graph,
    group: Group,
    class_suffix: str,
    heads: Mapping[tuple[int, int], int],
    every: Node,
    positions: Node,
    tokens: Node | int,
) -> Node:
    """The update node of a group; every [B,S,N]: utilities of all heads, positions [1,B,1,S]."""
    call, layers, kv_heads = graph.call, len(group.matches), group.kv_heads
    batch, capacity = graph.shape(graph.inputs["input_ids"])[0], graph.symbol(f"capacity{class_suffix}")
    shape = (layers * batch, kv_heads, capacity, 1)
    utility, token = (graph.input(f"{name}{group.suffix}", shape, torch.float32) for name in ROW_STATES)
    length, keep, plan = (
        graph.inputs[f"{name}{end}"]
        for name, end in (("length", class_suffix), ("keep", class_suffix), ("plan", group.suffix))
    )
    wanted = []
    for match in group.matches:
        attention = match.attention
        wanted += [heads[attention.layer, head] for head in attention.heads or range(attention.kv_heads)]
    with graph.before(graph.output_node):
        own = every
        if wanted != list(range(len(heads))):
            own = call(aten.index_select.default, every, 2, graph.constant("gated", torch.tensor(wanted)))
        size = graph.size(graph.inputs["input_ids"], 0)
        own = call(aten.reshape.default, own, [size, tokens, layers, kv_heads])
        own = call(aten.permute.default, own, [2, 0, 3, 1])  # [L,B,Hkv,S]
        at = call(aten.expand.default, positions, [layers, -1, kv_heads, -1])
        new = [call(aten.reshape.default, value, [-1, kv_heads, tokens, 1]) for value in (own, at)]
        _, _, plan_heads, _ = graph.shape(plan)
        plan = call(aten.expand.default, plan, [layers, -1, -1, -1])
        plan = call(aten.reshape.default, plan, [1, -1, plan_heads, graph.size(utility, 2)])
        length, keep = (call(aten.repeat.default, rows, [layers]) for rows in (length, keep))
        updated = call(torch.ops.keysieve.update.default, *new, length, plan, keep, utility, token, 0)
        for index, name in enumerate(ROW_STATES):
            graph.outputs[f"{name}{group.suffix}_next"] = graph.item(updated, index)
    return graph.outputs[f"utility{group.suffix}_next"]


def _float(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
