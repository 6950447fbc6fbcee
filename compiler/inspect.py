"""inspect: what matches in a model, or what a bundle holds, without loading any weights."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keysieve.compiler.bundle import MANIFEST, MODEL, open_bundle
from keysieve.compiler.config import EvictionConfig
from keysieve.compiler.head_classes import class_budgets, uniform
from keysieve.compiler.model import load_skeleton
from keysieve.compiler.pipeline import Matched, cache_layout, find
from keysieve.compiler.progress import Progress
from keysieve.compiler.rows import window_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class LayerReport:
    """One layer: kind "full", "sliding", "chunked", "linear", "conv" or "unsupported", and why it did not match.

    window: tokens that a token of a sliding or chunked layer sees at most, 0 where it sees all. rope_form: None where
    it is not known, which matters for layers that evict alone. The heads of layers that evict: query_heads, kv_heads
    and head_dim, 0 for others. latent: numbers of a token's latent where keys and values are expanded from one, as the
    cache holds them (MLA), 0 where they are not.
    """

    layer: int
    kind: str
    rope_form: str | None
    matched: bool
    reason: str | None
    node: str
    window: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    latent: int = 0


@dataclass(frozen=True)
class Report:
    """What `inspect` prints. Bytes count K and V: for a token, of the layers that grow; for the budget, of all.

    dtype: of the cache. quantized: what integer weights cost (see keysieve.export.quantize), empty without them.
    caches: of the layers that evict: layer, kv_heads (by number), share and rows of a head at the budget. without:
    what of sieve is left out, and why (see choose_terms).
    """

    architecture: str
    layers: list[LayerReport]
    kv_bytes_per_token: int
    budget: int
    kv_bytes_for_budget: int
    dtype: str
    nodes: dict[str, int] = field(default_factory=dict)
    eviction: dict[str, Any] = field(default_factory=dict)
    target: str = "onnxruntime"
    plans: list[dict[str, Any]] = field(default_factory=list)
    quantized: dict[str, Any] = field(default_factory=dict)
    caches: list[dict[str, Any]] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


def inspect(
    source: str | Path,
    eviction: EvictionConfig | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Report:
    """Report on a bundle folder, or capture and match a model (its configuration is enough: no weights are read)."""
    if any((Path(source) / name).is_file() for name in (MANIFEST, MODEL)):
        return _bundle_report(Path(source))
    model = load_skeleton(source, dtype)
    return report_of(model, find_fast(model, progress or Progress()), eviction or EvictionConfig(), dtype)


def find_fast(model: "PreTrainedModel", progress: Progress) -> Matched:
    """What `find` finds, for less: with fixed sizes where that is enough. The graph is of no further use."""
    matched = find(model, progress, only_to_find=True)
    unknown = len(matched.windowed) - len(matched.window_forms)
    if matched.misses or unknown:  # perhaps only because a model's code writes the fixed sizes into its shapes
        matched = find(model, progress)
    return matched


def report_of(model: "PreTrainedModel", matched: Matched, eviction: EvictionConfig, dtype: str) -> Report:
    """The report on a captured model."""
    rotary = matched.rotary
    reason = None if rotary else "no layer of the model has a rotary embedding"
    layers = []
    for rope in matched.ropes:
        found, latent = rope.attention, matched.latents.get(rope.attention.layer, 0)
        heads = found.query_heads, found.kv_heads, found.head_dim
        layers.append(
            LayerReport(found.number, "full", str(rope.form), rotary, reason, found.node.name, 0, *heads, latent)
        )
    for attention in matched.windowed:
        kind, size = ("sliding", attention.window) if attention.window else ("chunked", attention.chunk)
        known = matched.window_forms.get(attention.layer)
        form = None if known is None else str(known)
        latent = matched.latents.get(attention.layer, 0)
        layers.append(LayerReport(attention.number, kind, form, True, None, attention.node.name, size, latent=latent))
    for number, kind in matched.carried.items():
        layers.append(LayerReport(number, kind.removesuffix("_attention"), None, True, None, "-"))
    for miss in matched.misses:
        layers.append(LayerReport(miss.layer, "unsupported", None, False, miss.reason, miss.node))
    layers.sort(key=lambda layer: layer.layer)
    architecture = (model.config.architectures or [type(model).__name__])[0]
    classes = uniform([rope.attention.kv_heads for rope in matched.ropes]).entries()
    cached = [rope.attention for rope in matched.ropes] + matched.windowed  # the others were found and not matched
    content = {**cache_layout(sorted(cached, key=lambda attention: attention.layer)), "classes": classes}
    report = Report(architecture, layers, 0, eviction.budget, 0, dtype, {}, asdict(eviction))
    return of_layout(report, {**content, "row_states": []})


def of_layout(report: Report, content: dict[str, Any]) -> Report:
    """A report with the bytes and rows of these caches; content: of a manifest (EngineGraph.layout)."""
    per_token, for_budget = _kv_bytes(content, report.eviction, report.dtype)
    caches = _caches(content, report.eviction)
    return replace(report, kv_bytes_per_token=per_token, kv_bytes_for_budget=for_budget, caches=caches)


def _class_rows(content: dict[str, Any], eviction: dict[str, Any]) -> list[int]:
    """Rows of a head of each class at the budget; content: the manifest's caches, windows and classes."""
    budget, protected = np.array([eviction["budget"]]), eviction["sinks"] + eviction["recent"]
    return [int(rows[0]) for rows in class_budgets(content["classes"], budget, protected)]


def _caches(content: dict[str, Any], eviction: dict[str, Any]) -> list[dict[str, Any]]:
    """What the report says of each cache that evicts."""
    rows = _class_rows(content, eviction)
    return [
        {
            "layer": cache["layer"],
            "kv_heads": cache["heads"],
            "share": round(rows[cache["class"]] / eviction["budget"], 4),
            "rows": rows[cache["class"]],
        }
        for cache in content["caches"]
        if cache["window"] is None
    ]


def _kv_bytes(content: dict[str, Any], eviction: dict[str, Any], dtype: str) -> tuple[int, int]:
    """Bytes that a token adds to the caches, and that a sequence takes for that budget."""
    rows, interval = _class_rows(content, eviction), eviction["interval"]
    per_token = for_budget = 0
    for cache in content["caches"]:
        row = cache["kv_heads"] * (cache["head_dim"] + cache["value_dim"]) * ITEM_BYTES[dtype]
        if cache["window"] is None:
            per_token += row
            for_budget += row * (rows[cache["class"]] + interval)
        else:
            for_budget += row * window_rows(content["windows"][cache["window"]]["size"], interval)
    for state in content["row_states"]:
        row = state["layers"] * state["kv_heads"] * ITEM_BYTES["float32"]
        per_token += row
        for_budget += row * (rows[state["class"]] + interval)
    return per_token, for_budget


def _bundle_report(path: Path) -> Report:
    manifest = open_bundle(path).manifest
    report = Report(
        manifest["model"]["architecture"],
        [LayerReport(**layer) for layer in manifest["layers"]],
        0,
        manifest["eviction"]["budget"],
        0,
        manifest["kv_dtype"],
        manifest["nodes"],
        manifest["eviction"],
        manifest["target"],
        manifest.get("tensorrt", {}).get("plans", []),
        manifest.get("quantized", {}),
        without=manifest.get("without", {}),
    )
    return of_layout(report, manifest)
