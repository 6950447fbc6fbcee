"""insert_eviction: score the cached keys, and plan what the next step keeps.

    key_0' ... key_L', centre, weight -> score -> select(budget, limit, pinned) -> plan_next, keep_next, evicted

Caches of one group share both nodes, and a plan. How many rows are kept depends on budget and length alone, so there
is one keep and one evicted for all caches of a class. The nodes leave at once where no sequence is due (rows held <
limit). A plan is executed by the update nodes of the next step, so attention never sees a half-evicted cache.
"""

import torch
from torch.fx import Node

from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group
from keysieve.passes.insert_cache import Cache, class_suffixes
from keysieve.passes.policies import ScoreInputs


def insert_eviction(
    graph: Graph,
    cache: Cache,
    groups: list[Group],
    inputs: list[ScoreInputs],
    scope: str,
    sinks: int,
    recent: int,
    utility: list[Node] | None = None,
) -> None:
    """Add the inputs pinned and, for each class, budget and limit [B] int32.

    And the outputs keep_next and evicted of each class, and each group's plan. inputs: by group; utility: of the rows
    held (insert_gates), by group, or None.
    """
    batch, classes = graph.shape(cache.count)[0], class_suffixes(groups)
    budget, limit = (
        {each: graph.input(f"{name}{suffix}", (batch,), torch.int32) for each, suffix in classes.items()}
        for name in ("budget", "limit")
    )
    pinned = graph.input("pinned", (batch,), torch.int32)
    kept: dict[int, tuple[Node, Node]] = {}
    with graph.before(graph.output_node):
        for index, (group, keys, given) in enumerate(zip(groups, cache.keys, inputs, strict=True)):
            each = group.head_class
            scores = graph.call(
                torch.ops.keysieve.score.default,
                cache.lengths[each], limit[each], graph.inputs["position"], given.centre, given.weight, keys,
                given.policy, group.query_heads, given.rotary_dim, int(given.interleaved),
            )  # fmt: skip
            selected = graph.call(
                torch.ops.keysieve.select.default,
                scores, cache.lengths[each], limit[each], budget[each], pinned, scope, group.kv_heads, sinks, recent,
                *(utility[index : index + 1] if utility else ()),
            )  # fmt: skip
            graph.outputs[f"plan{group.suffix}_next"] = graph.item(selected, 0)
            kept[each] = graph.item(selected, 1), graph.item(selected, 2)
    for each, suffix in classes.items():
        graph.outputs[f"keep{suffix}_next"], graph.outputs[f"evicted{suffix}"] = kept[each]
