"""A report on a model or bundle in words, for `compile` and `inspect`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from keysieve.compiler.cli.terminal import human_bytes

if TYPE_CHECKING:
    from keysieve.compiler.inspect import LayerReport, Report


def report_rows(report: "Report") -> list[tuple[str, str]]:
    """(name, value) rows on policy, nodes and memory; a model that is not compiled has no nodes and no policy yet."""
    eviction = report.eviction
    nodes = ", ".join(f"{count} {name}" for name, count in report.nodes.items())
    plans = [
        (
            "plan",
            f"{plan['file']}, {human_bytes(plan['bytes'])}, {plan['plugin_layers']} plugin layers, "
            f"{plan['fused_attention_layers']} fused attentions",
        )
        for plan in report.plans
    ]
    return [
        *(_kept_rows(report) if nodes else []),
        *([("weights", _weights(report.quantized))] if report.quantized else []),
        ("nodes inserted", nodes or "none: `keysieve compile` inserts them"),
        ("KV cache", f"{human_bytes(report.kv_bytes_per_token)} a token, {report.dtype}"),
        (
            "",
            f"{human_bytes(report.kv_bytes_for_budget)} a sequence, for budget {report.budget} "
            f"and interval {eviction['interval']}",
        ),
        *plans,
    ]


def _kept_rows(report: "Report") -> list[tuple[str, str]]:
    """The policy; what of it is left out, and why; and how many rows heads of unequal budgets get."""
    rows = [("policy", policy_of(report.eviction))]
    reasons: dict[str, list[str]] = {}
    for what, why in report.without.items():
        reasons.setdefault(why, []).append(what)
    rows += [("", f"{' and '.join(lacking)}: {why}") for why, lacking in reasons.items()]
    heads: Counter[int] = Counter()
    for cache in report.caches:
        heads[cache["rows"]] += len(cache["kv_heads"])
    if len(heads) > 1:
        classes = ", ".join(f"{count} of {each:,} rows" for each, count in sorted(heads.items()))
        rows.append(("KV heads", f"{classes}, for budget {report.budget:,}"))
    return rows


def _weights(quantized: Mapping[str, Any]) -> str:
    before, after = (human_bytes(quantized[f"bytes_{when}"]) for when in ("before", "after"))
    return (
        f"{quantized['weights']}: {quantized['quantized']} of {quantized['products']} matrices, {after} in place of "
        f"{before}; root mean square error {quantized['error']:.1%}"
    )


def policy_of(eviction: Mapping[str, Any]) -> str:
    """ "triattention (calibrated centres), per_layer_per_head, 4 sinks, 128 recent, prompt evictable"."""
    policy = eviction["policy"]
    name = policy["name"]
    terms = policy["terms"] if name == "sieve" else ["trig"] if name == "triattention" else []
    details = [" + ".join(terms)] if name == "sieve" else []
    if "trig" in terms:
        details += [f"{policy['centres']} centres", f"{policy['aggregation']} over offsets to {policy['offset_max']}"]
        details += [f"no {term}" for term in ("trig", "norm") if not policy[term]]
    name += f" ({', '.join(details)})" if details else ""
    return (
        f"{name}, {eviction['scope']}, {eviction['sinks']} sinks, {eviction['recent']} recent, "
        f"prompt {eviction['prompt']}"
    )


def has_rope(layers: Iterable["LayerReport"]) -> bool:
    """Whether any layer has a rotary embedding that matched; without one a model cannot be compiled."""
    return any(layer.matched and layer.rope_form not in (None, "nope") for layer in layers)


def layer_rows(layers: Sequence["LayerReport"], policy: str) -> list[tuple[str, str, str, str]]:
    """(layers, kind, RoPE form, what happens) rows; equal neighbours share one. policy: "" where none is chosen yet."""
    rows = []
    heads = "query_heads", "kv_heads", "head_dim"
    alike = attrgetter("kind", "window", "rope_form", "matched", "reason", "latent", *heads)
    several = len({attrgetter(*heads)(layer) for layer in layers if layer.kv_heads}) > 1
    for _, group in groupby(layers, key=alike):
        members = list(group)
        first, last = members[0], members[-1]
        name = f"layer {first.layer}" if first is last else f"layers {first.layer}-{last.layer}"
        node = first.node if first is last else f"{first.node} to {last.node}"
        outcome = _fate(first, layers, policy) if first.matched else f"does not match, node {node}: {first.reason}"
        if several and first.kv_heads:
            outcome += f"; {first.query_heads} query and {first.kv_heads} KV heads of {first.head_dim}"
        if first.latent:
            outcome += f"; K and V expanded from a latent of {first.latent:,}"
        rows.append((name, first.kind, first.rope_form or "-", outcome))
    return rows


def _fate(layer: "LayerReport", layers: Sequence["LayerReport"], policy: str) -> str:
    if not has_rope(layers):
        return "has no rotary embedding"
    if layer.kind in ("linear", "conv"):
        return "carries its own state"
    if layer.window:
        return f"keeps its window of {layer.window:,} tokens"
    if not policy:
        rotates = has_rope([other for other in layers if other.kind == "full"])
        return "evicts" if rotates else "evicts, by --policy key-norm or streaming"
    if layer.rope_form == "nope" and policy in ("triattention", "sieve"):
        return "evicts by the plain product with its query centre"
    return f"evicts by {policy}"
