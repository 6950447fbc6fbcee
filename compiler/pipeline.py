"""The pass list: capture -> find -> (taps for calibration | cache and eviction for the engine)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keysieve.compiler.capture import capture
from keysieve.compiler.config import EvictionConfig
from keysieve.compiler.progress import Progress
from keysieve.compiler.statistics import Statistics
from keysieve.errors import MatchError
from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_rope import find_rope
from keysieve.passes.gather_logits import gather_logits
from keysieve.passes.graph import Graph
from keysieve.passes.insert_cache import insert_cache
from keysieve.passes.insert_eviction import insert_eviction
from keysieve.passes.lower_attention import lower_attention
from keysieve.passes.policies.stateless import stateless
from keysieve.passes.policies.triattention import QueryCentres, TriAttention, triattention
from keysieve.passes.result import Attention, Miss, RopeAttention
from keysieve.passes.rope_forms import lower_rope
from keysieve.passes.tap_prerope import tap_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Matched:
    """A captured graph with what the finding passes found in it."""

    graph: Graph
    attentions: list[Attention]
    ropes: list[RopeAttention]
    misses: list[Miss]

    @property
    def layers(self) -> int:
        """How many layers there are, matched or not."""
        return len(self.ropes) + len(self.misses)

    def require_all(self) -> list[RopeAttention]:
        """The matches, or a MatchError that lists every layer that did not match."""
        if self.misses:
            listed = "\n  ".join(str(miss) for miss in self.misses[:10])
            more = f"\n  and {len(self.misses) - 10} more" if len(self.misses) > 10 else ""
            raise MatchError(
                f"{len(self.misses)} of {self.layers} attention layers cannot be rewritten:\n  {listed}{more}\n"
                "`keysieve inspect MODEL` shows every layer"
            )
        if all(match.form.kind == "nope" for match in self.ropes):
            raise MatchError(
                f"none of the {self.layers} attention layers has a rotary embedding (node "
                f"{self.ropes[0].attention.node.name} and the others take their queries unrotated); "
                "keysieve needs a RoPE decoder"
            )
        return self.ropes


def find(
    model: "PreTrainedModel", progress: Progress, implementation: str | None = None, only_to_find: bool = False
) -> Matched:
    """Capture the model, and find attention and RoPE in it; arguments as capture's."""
    with progress.stage("capture") as stage:
        graph = capture(model, implementation, only_to_find)
        stage.note(f"{len(graph.fx.nodes):,} nodes")
    with progress.stage("match") as stage:
        lower_rope(graph)
        lowered = lower_attention(graph)
        attentions = find_attention(graph)
        ropes = find_rope(graph, attentions.matches)
        misses = lowered + attentions.misses + ropes.misses
        misses += _without_attention(model, [a.number for a in attentions.matches] + [m.layer for m in misses])
        matched = Matched(graph, attentions.matches, ropes.matches, misses)
        stage.note(f"{len(ropes.matches)} of {matched.layers} layers")
    return matched


def _without_attention(model: "PreTrainedModel", found: list[int]) -> list[Miss]:
    """The model's layers without any attention: what they carry from token to token would be lost."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or {}
    missing = sorted(set(range(getattr(config, "num_hidden_layers", 0))) - set(found))
    return [
        Miss(number, "-", f"no attention in this layer ({kinds[number]})" if kinds else "no attention in this layer")
        for number in missing
    ]


def tap_graph(matched: Matched) -> Graph:
    """The graph whose outputs are the pre-RoPE queries of every layer."""
    tap_only(matched.graph, matched.require_all())
    return matched.graph


def engine_graph(matched: Matched, eviction: EvictionConfig, statistics: Statistics | None) -> Graph:
    """The rewritten graph: cache, policy and eviction inserted; see docs/architecture.md for its inputs and outputs."""
    ropes = matched.require_all()
    graph, attentions, policy = matched.graph, matched.attentions, eviction.policy
    gather_logits(graph)
    cache = insert_cache(graph, attentions, eviction.scope)
    if policy.name == "triattention":
        options = TriAttention(policy.offsets, policy.aggregation, policy.trig, policy.norm)
        centres = None if policy.centres == "online" else query_centres(statistics)
        inputs = triattention(graph, cache, ropes, options, centres)
    else:
        inputs = stateless(graph, policy.name)
    insert_eviction(graph, cache, attentions, inputs, eviction.scope, eviction.sinks, eviction.recent)
    return graph


def query_centres(statistics: Statistics | None) -> QueryCentres:
    """Centres of all layers stacked: mean [L,Hq,D], magnitude [L,Hq,R/2] (zeros for layers without RoPE)."""
    import numpy as np

    if statistics is None:
        raise MatchError("calibrated centres need statistics; pass them, or choose online centres")
    bands = max(layer.rope.rotary_dim // 2 for layer in statistics.layers)
    mean = np.stack([layer.q_mean for layer in statistics.layers])
    magnitude = np.zeros((*mean.shape[:2], bands))
    for index, layer in enumerate(statistics.layers):
        magnitude[index, :, : layer.q_abs.shape[1]] = layer.q_abs
    return QueryCentres(mean, magnitude)


def model_sizes(matched: Matched) -> dict[str, Any]:
    """Head counts and sizes that every layer shares."""
    first = matched.attentions[0]
    return {
        "layers": matched.layers,
        "query_heads": first.query_heads,
        "kv_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "value_dim": first.value_dim,
    }
