"""in_place: all that an engine holds is changed where it lies, so that a step is a list of launches.

    key_l, value_l -> update -> key_l_next, value_l_next   becomes   update_(key_l, value_l)
    scores -> select -> plan_next, keep_next, evicted      becomes   select_(plan) -> keep_next, evicted
    query, key_l_next, value_l_next -> attend              becomes   attend_at(query, key_l, value_l)
    state -> ... -> state_next                             becomes   copy_(state, state_next), at the end

Logits and the number of evicted rows are returned, and `position` goes on by `count`. For the torch engine, whose
buffers stay where they are: a step can then be captured in a CUDA graph, and reads lengths and positions from the
device when it is replayed.
"""

import operator

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.plugins.torch.in_place import COUNTERS  # the module registers update_, score_at, select_ and attend_at

aten, ops = torch.ops.aten, torch.ops.keysieve
NEXT = "_next"


def in_place(graph: Graph) -> None:
    """Rewrite an engine's graph, and add inputs: counters, zeros [COUNTERS] int32 for the programs of attention.

    Where layers evict: addresses<suffix> [L] int64, where the keys of the layers that share a score lie.
    """
    counters = graph.input("counters", (COUNTERS,), torch.int32)
    for node in graph.calls(ops.attend.default):
        *tensors, scale, softcap = node.args
        with graph.before(node):
            read = graph.call(ops.attend_at.default, *tensors, counters, scale, softcap)
        node.replace_all_uses_with(read)
        graph.fx.erase_node(node)
    for node in graph.calls(ops.update.default):
        with graph.before(node):
            graph.call(ops.update_.default, *node.args)
        _replace_items(graph, node, [node.args[5], node.args[6]])  # type: ignore[list-item]
    pairs = zip(graph.calls(ops.score.default), graph.calls(ops.select.default), strict=True)
    for score, select in list(pairs):
        _score_and_select(graph, score, select)
    _write_back(graph)


def _score_and_select(graph: Graph, score: Node, select: Node) -> None:
    plan_next = next(name for name, node in graph.outputs.items() if node.args[:2] == (select, 0))
    plan = graph.inputs[plan_next.removesuffix(NEXT)]
    *given, keys, policy, query_heads, rotary_dim, interleaved = score.args
    layers = len(keys)  # type: ignore[arg-type]
    addresses = graph.input(f"addresses{plan.name.removeprefix('plan')}", (layers,), torch.int64)
    with graph.before(score):
        scores = graph.call(ops.score_at.default, *given, keys, addresses, policy, query_heads, rotary_dim, interleaved)
    score.replace_all_uses_with(scores)
    graph.fx.erase_node(score)
    tensors, constants = select.args[:5], select.args[5:]  # the utility, if there is one, comes last
    with graph.before(select):
        made = graph.call(ops.select_.default, *tensors, plan, *constants)
        keep, evicted = graph.item(made, 0), graph.item(made, 1)
    for name, output in list(graph.outputs.items()):
        if output.args[:2] == (select, 1):
            graph.outputs[name] = keep
        elif output.args[:2] == (select, 2):
            graph.outputs[name] = evicted
    _replace_items(graph, select, [plan, keep, evicted])


def _replace_items(graph: Graph, node: Node, held: list[Node]) -> None:
    """What reads the results of a node reads the inputs that now hold them."""
    for user in list(node.users):
        if user.target is operator.getitem:
            kept = held[user.args[1]]  # type: ignore[index]
            user.replace_all_uses_with(kept)
            for name in [name for name, output in graph.outputs.items() if output is user]:
                del graph.outputs[name]
            graph.fx.erase_node(user)
    graph.fx.erase_node(node)


def _write_back(graph: Graph) -> None:
    with graph.before(graph.output_node):
        for name in [name for name in graph.outputs if name.endswith(NEXT)]:
            graph.call(aten.copy_.default, graph.inputs[name.removesuffix(NEXT)], graph.outputs.pop(name))
        graph.call(aten.add_.Tensor, graph.inputs["position"], graph.inputs["count"])
