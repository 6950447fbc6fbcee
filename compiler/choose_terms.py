"""What the default policy adds up and whose budgets differ, where the user leaves it to the statistics."""

from dataclasses import replace

from keysieve.compiler.config import ON_TENSORRT, EvictionConfig
from keysieve.compiler.pipeline import Matched
from keysieve.compiler.statistics import Statistics
from keysieve.passes.find_inputs import inputs_or_misses

LEARN = "`keysieve calibrate MODEL -o FILE` learns them"
LACKING = f"these statistics lack them; {LEARN}"


def choose_terms(
    eviction: EvictionConfig, matched: Matched, statistics: Statistics | None, target: str
) -> tuple[EvictionConfig, dict[str, str]]:
    """The same with terms and heads, where these are None; and why sieve goes "without gates" or "without shares".

    sieve has the gate where every layer that evicts has one, and budgets by class where every one has shares. TensorRT
    targets have neither.
    """
    policy, heads, without = eviction.policy, eviction.heads, {}
    refused = f"{target} takes none yet" if target in ON_TENSORRT else ""
    if policy.name == "sieve" and policy.terms is None:
        reason = refused or why_no_gates(matched, statistics)
        policy = replace(policy, terms=("trig",) if reason else ("trig", "gate"))
        if reason:
            without["without gates"] = reason
    if heads is None:
        reason = refused or _why_uniform(eviction, matched, statistics)
        heads = "uniform" if reason else "classes"
        if reason:
            without["without shares"] = reason
    return replace(eviction, policy=policy, heads=heads), without


def why_no_gates(matched: Matched, statistics: Statistics | None) -> str:
    """Why not every layer that evicts has a gate; "" where all have."""
    attentions = [rope.attention for rope in matched.ropes]
    if not attentions:
        return "no layer evicts"
    for miss in inputs_or_misses(matched.graph, attentions).misses:
        return f"this model can have none: {miss}"
    return _why_lacking("gate_weight", matched, statistics)


def why_no_shares(matched: Matched, statistics: Statistics | None) -> str:
    """Why not every layer that evicts has shares for its heads; "" where all have."""
    learned = statistics.learned if statistics is not None else None
    if learned is None:  # shares are learned with gates alone
        return why_no_gates(matched, statistics) or LACKING
    if learned.finished and not learned.budgets:
        return "the text of the calibration, or the model's longest text, was too short to learn them"
    return _why_lacking("share", matched, statistics)


def _why_uniform(eviction: EvictionConfig, matched: Matched, statistics: Statistics | None) -> str:
    if eviction.scope != "per_layer_per_head":
        return f"scope {eviction.scope} keeps the same rows in several heads"
    return why_no_shares(matched, statistics)


def _why_lacking(name: str, matched: Matched, statistics: Statistics | None) -> str:
    if statistics is None:
        return f"there are no statistics; {LEARN}"
    known = {layer.layer: getattr(layer, name, None) for layer in statistics.layers}
    if any(known.get(rope.attention.layer) is None for rope in matched.ropes):
        return LACKING
    return ""
