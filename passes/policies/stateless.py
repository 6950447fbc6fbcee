"""Policies whose score needs nothing but the cache: streaming (sinks + recent), key-norm and random (controls).

streaming: a row's score is its index, so the newest rows stay. key-norm: -|k|. random: a hash of position, row, head
and layer, the same in every runtime. Sources: StreamingLLM (arXiv 2309.17453); L2 norm of keys (arXiv 2406.11430).
"""

import torch

from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group
from keysieve.passes.policies import ScoreInputs

SCORE_NAMES = {"streaming": "streaming", "key-norm": "key_norm", "random": "random"}


def stateless(graph: Graph, policy: str) -> ScoreInputs:
    """Score inputs of a policy without statistics."""
    centre = graph.constant("centre_unused", torch.zeros(1, 1, 1, 1, 1))
    weight = graph.constant("weight_unused", torch.zeros(1, 1, 1, 1))
    return ScoreInputs(SCORE_NAMES[policy], centre, weight, 0, False)


def alike(graph: Graph, group: Group) -> ScoreInputs:
    """Score inputs by which all keys of a group are alike, so that what the rows are worth decides alone."""
    heads, form = group.query_heads, group.matches[0].form
    bands = max(form.rotary_dim // 2, 1)
    centre = graph.constant("centre_zero", torch.zeros(len(group.matches), 1, heads, 1, group.head_dim))
    weight = graph.constant("weight_zero", torch.zeros(len(group.matches), 1, heads, bands))
    with graph.before(graph.output_node):
        batch = graph.size(graph.inputs["input_ids"], 0)
        centre = graph.call(torch.ops.aten.expand.default, centre, [-1, batch, -1, -1, -1])
        weight = graph.call(torch.ops.aten.expand.default, weight, [-1, batch, -1, -1])
    return ScoreInputs("trig", centre, weight, 2 * bands, False)
