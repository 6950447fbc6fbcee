"""Policies whose score needs nothing but the cache: streaming (sinks + recent), key-norm and random (controls).

streaming: a row's score is its index, so the newest rows stay. key-norm: -|k|. random: a hash of position, row, head
and layer, the same in every runtime. Sources: StreamingLLM (arXiv 2309.17453); L2 norm of keys (arXiv 2406.11430).
"""

import torch

from keysieve.passes.graph import Graph
from keysieve.passes.policies import ScoreInputs

SCORE_NAMES = {"streaming": "streaming", "key-norm": "key_norm", "random": "random"}


def stateless(graph: Graph, policy: str) -> ScoreInputs:
    """Score inputs of a policy without statistics."""
    centre = graph.constant("centre_unused", torch.zeros(1, 1, 1, 1, 1))
    weight = graph.constant("weight_unused", torch.zeros(1, 1, 1, 1))
    return ScoreInputs(SCORE_NAMES[policy], centre, weight, 0, False)
