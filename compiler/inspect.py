"""inspect: what matches in a model, or what a bundle holds, without loading any weights."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keysieve.compiler.bundle import MANIFEST, MODEL, open_bundle
from keysieve.compiler.config import EvictionConfig
from keysieve.compiler.model import load_skeleton
from keysieve.compiler.pipeline import Matched, find
from keysieve.compiler.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class LayerReport:
    """One attention layer: kind "full", "sliding" or "unsupported", its RoPE form, and why it did not match."""

    layer: int
    kind: str
    rope_form: str | None
    matched: bool
    reason: str | None
    node: str


@dataclass(frozen=True)
class Report:
    """What `inspect` prints. Bytes count K and V of all layers."""

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
    if matched.misses:  # perhaps only because the code of a model writes the fixed sizes into its shapes
        matched = find(model, progress)
    return matched


def report_of(model: "PreTrainedModel", matched: Matched, eviction: EvictionConfig, dtype: str) -> Report:
    """The report on a captured model."""
    rotary = any(rope.form.kind != "nope" for rope in matched.ropes)
    reason = None if rotary else "no layer of the model has a rotary embedding"
    layers = [
        LayerReport(rope.attention.number, "full", str(rope.form), rotary, reason, rope.attention.node.name)
        for rope in matched.ropes
    ]
    for miss in matched.misses:
        kind = "sliding" if "sliding window" in miss.reason else "unsupported"
        layers.append(LayerReport(miss.layer, kind, None, False, miss.reason, miss.node))
    layers.sort(key=lambda layer: layer.layer)
    item = ITEM_BYTES[dtype]
    per_token = sum(a.kv_heads * (a.head_dim + a.value_dim) * item for a in matched.attentions)
    architecture = (model.config.architectures or [type(model).__name__])[0]
    rows = eviction.budget + eviction.interval
    return Report(architecture, layers, per_token, eviction.budget, per_token * rows, dtype, {}, asdict(eviction))


def _bundle_report(path: Path) -> Report:
    manifest = open_bundle(path).manifest
    sizes, eviction = manifest["sizes"], manifest["eviction"]
    item = ITEM_BYTES[manifest["dtype"]]
    per_token = sizes["layers"] * sizes["kv_heads"] * (sizes["head_dim"] + sizes["value_dim"]) * item
    return Report(
        manifest["model"]["architecture"],
        [LayerReport(**layer) for layer in manifest["layers"]],
        per_token,
        eviction["budget"],
        per_token * (eviction["budget"] + eviction["interval"]),
        manifest["dtype"],
        manifest["nodes"],
        eviction,
        manifest["target"],
        manifest.get("tensorrt", {}).get("plans", []),
    )
