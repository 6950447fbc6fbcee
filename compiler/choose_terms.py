"""What the default policy adds up and whose budgets differ, where the user leaves it to the statistics."""

from dataclasses import replace

from keysieve.compiler.config import ON_TENSORRT, EvictionConfig
from keysieve.compiler.pipeline import Matched
from keysieve.compiler.statistics import LayerStatistics, Statistics
from keysieve.passes.find_inputs import find_inputs
from keysieve.passes.result import Attention


def choose_terms(
    eviction: EvictionConfig, matched: Matched, statistics: Statistics | None, target: str
) -> EvictionConfig:
    """The same with terms and heads, where these are None.

    sieve has the gate where every layer that evicts has one, and budgets by class where every one has shares. TensorRT
    targets have neither.
    """
    policy, heads = eviction.policy, eviction.heads
    known = {} if statistics is None else {layer.layer: layer for layer in statistics.layers}
    attentions = [rope.attention for rope in matched.ropes]
    able = policy.name == "sieve" and bool(attentions) and target not in ON_TENSORRT
    if policy.name == "sieve" and policy.terms is None:
        gated = able and _all_have("gate_weight", attentions, known)
        gated = gated and len(find_inputs(matched.graph, attentions)) == len(attentions)
        policy = replace(policy, terms=("trig", "gate") if gated else ("trig",))
    if heads is None:
        shared = able and eviction.scope == "per_layer_per_head" and _all_have("share", attentions, known)
        heads = "classes" if shared else "uniform"
    return replace(eviction, policy=policy, heads=heads)


def _all_have(name: str, attentions: list[Attention], known: dict[int, LayerStatistics]) -> bool:
    return all(getattr(known.get(attention.layer), name, None) is not None for attention in attentions)
