"""insert_eviction: score the cached keys, and plan what the next step keeps.

    key_0' ... key_L', centre, weight -> score -> select(budget, limit, pinned) -> plan_next, keep_next, evicted

Layers of one shape share both nodes, and a plan. How many rows are kept depends on budget and length alone, so there
is one keep and one evicted for all of them. The nodes leave at once where no sequence is due (rows held < limit). A
plan is executed by the update nodes of the next step, so attention never sees a half-evicted cache.
"""

import torch

from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group
from keysieve.passes.insert_cache import Cache
from keysieve.passes.policies import ScoreInputs


def insert_eviction(
    graph: Graph, cache: Cache, groups: list[Group], inputs: list[ScoreInputs], scope: str, sinks: int, recent: int
) -> None:
    """Add the inputs budget, limit, pinned [B] int32 and the outputs keep_next, evicted and each group's plan."""
    batch = graph.shape(cache.count)[0]
    budget, limit, pinned = (graph.input(name, (batch,), torch.int32) for name in ("budget", "limit", "pinned"))
    with graph.before(graph.output_node):
        for group, keys, given in zip(groups, cache.keys, inputs, strict=True):
            scores = graph.call(
                torch.ops.keysieve.score.default,
                cache.length, limit, graph.inputs["position"], given.centre, given.weight, keys,
                given.policy, group.query_heads, given.rotary_dim, int(given.interleaved),
            )  # fmt: skip
            selected = graph.call(
                torch.ops.keysieve.select.default,
                scores, cache.length, limit, budget, pinned, scope, group.kv_heads, sinks, recent,
            )  # fmt: skip
            graph.outputs[f"plan{group.suffix}_next"] = graph.item(selected, 0)
        for index, name in enumerate(("keep_next", "evicted"), 1):
            graph.outputs[name] = graph.item(selected, index)
