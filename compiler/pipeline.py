"""The pass list: capture -> find -> (taps for calibration | cache and eviction for the engine)."""

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from keysieve.compiler.capture import capture
from keysieve.compiler.config import EvictionConfig
from keysieve.compiler.head_classes import HeadClasses, uniform
from keysieve.compiler.model import TORCH_DTYPES
from keysieve.compiler.progress import Progress
from keysieve.compiler.statistics import Statistics
from keysieve.errors import MatchError, StatisticsError
from keysieve.passes.arrange_heads import arrange_heads
from keysieve.passes.carry_states import State, carried_layers, carry_states
from keysieve.passes.find_attention import find_attention
from keysieve.passes.find_latents import find_latents
from keysieve.passes.find_rope import find_rope
from keysieve.passes.gather_logits import gather_logits
from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group, group_layers, group_parts
from keysieve.passes.insert_cache import group_windows, insert_cache
from keysieve.passes.insert_eviction import insert_eviction
from keysieve.passes.insert_gates import Gate, check_gates, gate_inputs, insert_gates
from keysieve.passes.lower_attention import lower_attention
from keysieve.passes.lower_complex import lower_complex
from keysieve.passes.lower_fills import lower_fills
from keysieve.passes.lower_positions import lower_positions
from keysieve.passes.policies.parts import of_parts
from keysieve.passes.policies.stateless import alike, stateless
from keysieve.passes.policies.triattention import (
    QueryCentres,
    TriAttention,
    check_rotation,
    common_form,
    triattention,
)
from keysieve.passes.result import Attention, Miss, RopeAttention
from keysieve.passes.rope_form import RopeForm
from keysieve.passes.rope_forms import lower_rope
from keysieve.passes.split_heads import split_heads
from keysieve.passes.tap_inputs import tap_inputs
from keysieve.passes.tap_prerope import tap_only
from keysieve.plugins.contract import ROW_STATES, plan_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Matched:
    """A captured graph with what the finding passes found in it.

    attentions: all that can be given a cache; ropes: those of them that evict; window_forms: the RoPE of the others by
    layer, where it is one that keysieve knows (nothing depends on it). carried: layers without attention whose state
    the engine carries, by number, with their kinds. latents: widths of the latents from which layers expand their keys
    and values, by layer.
    """

    graph: Graph
    attentions: list[Attention]
    ropes: list[RopeAttention]
    misses: list[Miss]
    window_forms: dict[int, RopeForm] = field(default_factory=dict)
    carried: dict[int, str] = field(default_factory=dict)
    latents: dict[int, int] = field(default_factory=dict)

    @property
    def windowed(self) -> list[Attention]:
        """The attentions that hold a window of the text and evict nothing."""
        return [attention for attention in self.attentions if not attention.evicts]

    @property
    def groups(self) -> list[Group]:
        """The layers that evict, by shape."""
        return group_layers(self.ropes)

    @property
    def layers(self) -> int:
        """How many layers there are, matched or not."""
        return len(self.ropes) + len(self.windowed) + len(self.carried) + len(self.misses)

    @property
    def rotary(self) -> bool:
        """Whether any layer has a rotary embedding."""
        forms = [*(match.form for match in self.ropes), *self.window_forms.values()]
        return any(form.kind != "nope" for form in forms)

    def require_all(self) -> list[RopeAttention]:
        """The matches, or a MatchError that lists every layer that did not match."""
        if self.misses:
            listed = "\n  ".join(str(miss) for miss in self.misses[:10])
            more = f"\n  and {len(self.misses) - 10} more" if len(self.misses) > 10 else ""
            raise MatchError(
                f"{len(self.misses)} of {self.layers} attention layers cannot be rewritten:\n  {listed}{more}\n"
                "`keysieve inspect MODEL` shows every layer"
            )
        if not self.rotary:
            raise MatchError(
                f"none of the {self.layers} attention layers has a rotary embedding (node "
                f"{self.attentions[0].node.name} and the others take their queries unrotated); "
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
        lower_complex(graph)
        lower_fills(graph)
        lowered = lower_attention(graph)
        attentions = find_attention(graph)
        lower_positions(graph, attentions.matches)
        ropes = find_rope(graph, [attention for attention in attentions.matches if attention.evicts])
        windowed = find_rope(graph, [attention for attention in attentions.matches if not attention.evicts])
        misses = lowered + attentions.misses + ropes.misses
        kinds = _without_attention(model, [a.number for a in attentions.matches] + [m.layer for m in misses])
        carried = carried_layers(graph, kinds)
        misses += [Miss(number, "-", _why_not(kind)) for number, kind in kinds.items() if number not in carried]
        forms = {rope.attention.layer: rope.form for rope in windowed.matches}
        latents = find_latents(graph, attentions.matches)
        matched = Matched(graph, attentions.matches, ropes.matches, misses, forms, carried, latents)
        stage.note(f"{matched.layers - len(misses)} of {matched.layers} layers")
    return matched


def _without_attention(model: "PreTrainedModel", found: list[int]) -> dict[int, str]:
    """The model's layers without any attention, by number, with their kinds ("" where the configuration has none)."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or {}
    missing = sorted(set(range(getattr(config, "num_hidden_layers", 0))) - set(found))
    return {number: kinds[number] if kinds else "" for number in missing}


def _why_not(kind: str) -> str:
    return f"no attention in this layer{f' ({kind})' if kind else ''}, and no state that could be carried"


def tap_graph(matched: Matched, learn: bool = False) -> Graph:
    """The graph whose outputs are the pre-RoPE queries of every layer, and for gates what tap_inputs adds."""
    ropes = matched.require_all()
    if not ropes:
        raise MatchError(
            f"all {matched.layers} layers have a sliding window, so nothing is evicted and nothing to calibrate"
        )
    tap_only(matched.graph, ropes)
    if learn:
        tap_inputs(matched.graph, ropes)
    return matched.graph


@dataclass(frozen=True)
class EngineGraph:
    """The rewritten graph, the states that it carries beside the caches, and what has a cache, by groups.

    attentions: those of the model, or the parts that split_heads made of them. See docs/architecture.md for the graph's
    inputs and outputs.
    """

    graph: Graph
    states: list[State]
    attentions: list[Attention]
    groups: list[Group]
    classes: HeadClasses
    gated: bool = False

    def layout(self, scope: str) -> dict[str, Any]:
        """What a session allocates, of a manifest: caches and windows, plans, states, and the classes of heads."""
        plans = {
            f"plan{group.suffix}": {
                "layers": plan_shape(scope, len(group.matches), None, group.kv_heads, None)[0],
                "kv_heads": plan_shape(scope, len(group.matches), None, group.kv_heads, None)[2],
                "class": group.head_class,
            }
            for group in self.groups
        }
        row_states = [
            {
                "name": f"{name}{group.suffix}",
                "layers": len(group.matches),
                "kv_heads": group.kv_heads,
                "class": group.head_class,
            }
            for group in (self.groups if self.gated else [])
            for name in ROW_STATES
        ]
        states = {
            "states": [asdict(state) for state in self.states],
            "row_states": row_states,
            "classes": self.classes.entries(),
        }
        return {**cache_layout(self.attentions), "plans": plans, **states}


def engine_graph(
    matched: Matched,
    eviction: EvictionConfig,
    statistics: Statistics | None,
    kv_dtype: str | None = None,
    classes: HeadClasses | None = None,
) -> EngineGraph:
    """Insert caches, policy and eviction. classes: of the KV heads of the layers that evict; None: all in one."""
    ropes = matched.require_all()
    classes = classes or uniform([rope.attention.kv_heads for rope in ropes])
    graph, policy = matched.graph, eviction.policy
    hidden, gates = {}, {}
    if policy.gated and ropes:
        evicting = [rope.attention for rope in ropes]
        hidden, gates = gate_inputs(graph, evicting), learned_gates(statistics)
        check_gates(evicting, gates)
    gather_logits(graph)
    attentions, ropes = arrange_heads(graph, matched.attentions, ropes)
    layers = group_layers(ropes)
    of_heads = {rope.attention.layer: heads for rope, heads in zip(ropes, classes.of_heads, strict=True)}
    attentions, parts = split_heads(graph, attentions, ropes, of_heads)
    groups = group_parts(layers, parts)
    cache = insert_cache(graph, attentions, groups, eviction.scope, TORCH_DTYPES[kv_dtype] if kv_dtype else None)
    states = carry_states(graph, cache.count)
    engine = EngineGraph(graph, states, attentions, groups, classes)
    if not ropes:
        return engine
    if policy.trigonometric:
        options = TriAttention(policy.offsets, policy.aggregation, policy.trig, policy.norm)
        check_rotation(ropes)
        online = policy.centres == "online"
        inputs = [
            triattention(graph, cache, group, options, None if online else query_centres(statistics, group))
            for group in layers
        ]
        inputs = [of_parts(graph, inputs[group.source], layers[group.source], group) for group in groups]
    elif policy.gated:
        inputs = [alike(graph, group) for group in groups]
    else:
        inputs = [stateless(graph, policy.name)] * len(groups)
    utility = insert_gates(graph, cache, groups, hidden, gates) if policy.gated else None
    insert_eviction(graph, cache, groups, inputs, eviction.scope, eviction.sinks, eviction.recent, utility)
    return replace(engine, gated=policy.gated)


def learned_gates(statistics: Statistics | None) -> dict[int, Gate]:
    """The gates of a statistics file by layer. Raises StatisticsError where it has none."""
    layers = statistics.layers if statistics is not None else []
    gates = {
        layer.layer: Gate(layer.gate_weight, layer.gate_bias)
        for layer in layers
        if layer.gate_weight is not None and layer.gate_bias is not None
    }
    if not gates:
        raise StatisticsError(
            "the term gate needs gates, which these statistics lack; `keysieve calibrate MODEL -o FILE` learns them, "
            "or choose --terms trig"
        )
    return gates


def query_centres(statistics: Statistics | None, group: Group) -> QueryCentres:
    """Centres of a group's layers stacked: mean [L,Hq,D], magnitude [L,Hq,R/2] (zeros for layers without RoPE)."""
    import numpy as np

    if statistics is None:
        raise MatchError("calibrated centres need statistics; pass them, or choose online centres")
    by_layer = {entry.layer: entry for entry in statistics.layers}
    layers = [by_layer[match.attention.layer] for match in group.matches]
    mean = np.stack([layer.q_mean for layer in layers])
    magnitude = np.zeros((*mean.shape[:2], common_form(group).rotary_dim // 2))
    for index, layer in enumerate(layers):
        magnitude[index, :, : layer.q_abs.shape[1]] = layer.q_abs
    return QueryCentres(mean, magnitude)


def model_sizes(matched: Matched) -> dict[str, Any]:
    """How many layers evict, and their head counts and sizes: a number that all share, or a list of one a layer."""
    evicting = [rope.attention for rope in matched.ropes] or matched.attentions[:1]
    sizes: dict[str, Any] = {"layers": len(matched.ropes)}
    for name in ("query_heads", "kv_heads", "head_dim", "value_dim"):
        found = [getattr(attention, name) for attention in evicting]
        sizes[name] = found[0] if len(set(found)) == 1 else found
    return sizes


def cache_layout(attentions: list[Attention]) -> dict[str, Any]:
    """The caches of a manifest, one entry for each attention, and the "windows" that some of them refer to."""
    windows = group_windows(attentions)
    window_of = {layer: index for index, window in enumerate(windows) for layer in window.layers}
    caches = [
        {
            "name": attention.cache,
            "layer": attention.layer,
            "heads": list(range(attention.kv_heads) if attention.heads is None else attention.heads),
            "kv_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "value_dim": attention.value_dim,
            "class": attention.head_class if attention.evicts else None,
            "window": window_of.get(attention.layer),
        }
        for attention in attentions
    ]
    return {"caches": caches, "windows": [asdict(window.span) | {"size": window.size} for window in windows]}
