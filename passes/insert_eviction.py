"""insert_eviction: score the cached keys, and plan what the next step keeps.

    key_0' ... key_L', centre, weight -> score -> select(budget, limit, pinned) -> plan_next, keep_next, evicted

Both nodes leave at once where no sequence is due (rows held < limit). The plan is executed by the update nodes of the
next step, so attention never sees a half-evicted cache.
"""

import torch

from keysieve.passes.graph import Graph
from keysieve.passes.insert_cache import Cache
from keysieve.passes.policies import ScoreInputs
from keysieve.passes.result import Attention


def insert_eviction(
    graph: Graph, cache: Cache, attentions: list[Attention], inputs: ScoreInputs, scope: str, sinks: int, recent: int
) -> None:
    """Add the inputs budget, limit, pinned [B] int32 and the outputs plan_next, keep_next, evicted."""
    batch = graph.shape(cache.count)[0]
    first = attentions[0]
    budget, limit, pinned = (graph.input(name, (batch,), torch.int32) for name in ("budget", "limit", "pinned"))
    with graph.before(graph.output_node):
        scores = graph.call(
            torch.ops.keysieve.score.default,
            cache.length, limit, graph.inputs["position"], inputs.centre, inputs.weight, cache.keys,
            inputs.policy, first.query_heads, inputs.rotary_dim, int(inputs.interleaved),
        )  # fmt: skip
        selected = graph.call(
            torch.ops.keysieve.select.default,
            scores, cache.length, limit, budget, pinned, scope, first.kv_heads, sinks, recent,
        )  # fmt: skip
        for index, name in enumerate(("plan_next", "keep_next", "evicted")):
            graph.outputs[name] = graph.item(selected, index)
