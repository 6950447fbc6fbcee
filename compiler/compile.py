"""compile: a HuggingFace decoder becomes a bundle with one ONNX file that evicts its own cache."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from keysieve.compiler import statistics_file
from keysieve.compiler.bundle import (
    MODEL,
    NATIVE_MODEL,
    PROGRAM,
    STATE,
    STATISTICS,
    WEIGHTS,
    new_folder,
    write_manifest,
)
from keysieve.compiler.check_split import check_split
from keysieve.compiler.choose_terms import choose_terms, why_no_shares
from keysieve.compiler.config import ON_TENSORRT, CompileConfig, EvictionConfig
from keysieve.compiler.head_classes import HeadClasses, classify, uniform
from keysieve.compiler.inspect import Report, of_layout, report_of
from keysieve.compiler.model import identity, load_model, load_skeleton, load_tokenizer, round_weights
from keysieve.compiler.pipeline import (
    Matched,
    engine_graph,
    find,
    model_sizes,
    query_centres,
)
from keysieve.compiler.progress import Progress
from keysieve.compiler.statistics import Identity, Statistics
from keysieve.compiler.tensorrt import (
    check_tensorrt,
    kernel_configuration,
    window_capacities,
    write_library,
    write_plans,
)
from keysieve.compiler.whole_file import existing
from keysieve.errors import BundleError, CaptureError, ConfigError
from keysieve.export.onnx import export_onnx
from keysieve.export.onnxruntime import export_for_onnxruntime
from keysieve.export.tensorrt import LIBRARY
from keysieve.export.torch import export_torch
from keysieve.passes.graph import Graph
from keysieve.passes.policies.triattention import QueryCentres, common_form
from keysieve.plugins.contract import NODES
from keysieve.version import __version__


def compile(
    model: str | Path,
    output: Path | str,
    config: CompileConfig | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Report:
    """Capture, match, rewrite and export MODEL into the bundle folder `output`; returns what was matched.

    dry_run: do all of it without weights and without writing anything (statistics are then checked for shape only).
    Raises KeySieveError's subclasses; `output` appears only when everything succeeded.
    """
    config = config or CompileConfig(EvictionConfig())
    progress = progress or Progress()
    output = Path(output)
    if output.exists() and not dry_run:
        raise BundleError(f"output {output} exists already; remove it or choose another name")
    limits = check_tensorrt(config) if config.target in ON_TENSORRT else None
    if config.stats is not None:
        existing(config.stats)
    tokenizer = None if dry_run else load_tokenizer(model)
    with progress.stage("load"):
        loaded = load_skeleton(model, config.dtype) if dry_run else load_model(model, "auto")
        source = identity(loaded)  # of the weights as stored: statistics fit every dtype
        if not dry_run:
            round_weights(loaded, config.dtype)
    matched = find(loaded, progress)
    matched.require_all()
    sizes = model_sizes(matched)
    model_identity = {**source, **sizes}
    statistics = _statistics(config, model_identity, matched, weights_known=not dry_run)
    eviction, without = choose_terms(config.eviction, matched, statistics, config.target)
    config = replace(config, eviction=eviction)
    report = replace(report_of(loaded, matched, config.eviction, config.cache_dtype), without=without)
    if config.dump_graphs:
        _dump(config.dump_graphs, "captured", matched.graph)
    with progress.stage("rewrite") as stage:
        initial = _initial_state(config, matched, statistics)
        classes = _head_classes(config.eviction, matched, statistics)
        engine = engine_graph(matched, config.eviction, statistics, config.kv_dtype, classes)
        graph, layout = engine.graph, engine.layout(config.eviction.scope)
        report = of_layout(report, layout)
        stage.note(f"{len(graph.fx.nodes):,} nodes")
    kernels = None
    if limits:
        kernels = kernel_configuration(graph, config.dtype)
        limits = replace(limits, windows=window_capacities(config, [window["size"] for window in layout["windows"]]))
    if config.dump_graphs:
        _dump(config.dump_graphs, "rewritten", graph)
    if dry_run:
        return replace(report, nodes=_node_counts(graph))
    with progress.stage("check"):
        check_split(graph, [attention.number for attention in matched.attentions])
    with new_folder(output) as folder:
        if kernels:
            write_library(kernels, config.tensorrt, folder / LIBRARY, progress)
        with progress.stage("export") as stage:
            metadata, nodes = _metadata(config, model_identity), _node_counts(graph)
            quantized = None
            if config.target == "torch":
                export_torch(graph, folder / PROGRAM, folder / WEIGHTS, metadata)
            else:
                quantized = export_onnx(graph, folder / MODEL, metadata, config.inline, config.weights)
            if config.target == "onnxruntime" and config.dtype == "float32" and not config.inline:
                export_for_onnxruntime(folder / MODEL, folder / NATIVE_MODEL, engine.attentions)
            stage.note(f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:,.0f} MB")
        built = write_plans(folder, folder / MODEL, config, limits, progress) if limits else {}
        with progress.stage("bundle"):
            with _written_by_libraries(output):
                tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
                loaded.config.save_pretrained(folder)
                if initial:
                    save_file(initial, folder / STATE)
            if statistics is not None:
                statistics_file.save(statistics, folder / STATISTICS)
            report = replace(report, nodes=nodes, target=config.target, plans=built.get("plans", []))
            if quantized:
                report = replace(report, quantized={"weights": config.weights, **asdict(quantized)})
            content = _manifest(loaded, tokenizer, config, model_identity, sizes, layout, report)
            write_manifest(folder, {**content, **({"tensorrt": built} if built else {})})
    return report


@contextmanager
def _written_by_libraries(output: Path) -> Iterator[None]:
    """tokenizers and safetensors raise kinds of their own for what the system refuses, such as a full disk."""
    try:
        yield
    except Exception as error:
        raise BundleError(f"cannot write {output}: {error}; nothing was left behind") from error


def _statistics(config: CompileConfig, model: Identity, matched: Matched, weights_known: bool) -> Statistics | None:
    if config.stats is None:
        return None
    heads = [rope.attention.query_heads for rope in matched.ropes]
    unknown = () if weights_known else ("weights_sha256",)
    forms, numbers = [rope.form for rope in matched.ropes], [rope.attention.layer for rope in matched.ropes]
    layers = numbers if matched.windowed else None
    return statistics_file.read(config.stats, model, forms, heads, unknown, layers)


def _head_classes(eviction: EvictionConfig, matched: Matched, statistics: Statistics | None) -> HeadClasses:
    """One class, or those that the shares of the statistics make."""
    if eviction.heads != "classes" or not matched.ropes:
        return uniform([rope.attention.kv_heads for rope in matched.ropes])
    learned = statistics.learned if statistics is not None else None
    shares = {layer.layer: layer.share for layer in statistics.layers} if statistics is not None else {}
    found = [share for rope in matched.ropes if (share := shares.get(rope.attention.layer)) is not None]
    if learned is None or len(found) < len(matched.ropes):
        raise ConfigError(
            f"head budgets need shares of the heads: {why_no_shares(matched, statistics)}, or leave --heads out"
        )
    protected = eviction.sinks + eviction.recent
    return classify(found, learned.budgets, eviction.budget, eviction.head_classes, protected)


def _initial_state(config: CompileConfig, matched: Matched, statistics: Statistics | None) -> dict[str, np.ndarray]:
    """Where online centres start: at the calibrated ones if statistics are given, else at zero."""
    policy = config.eviction.policy
    if not policy.trigonometric or policy.centres != "online" or not matched.ropes:
        return {}
    state = {}
    for group in matched.groups:
        if statistics is None:
            shape = (len(group.matches), group.query_heads)
            bands = common_form(group).rotary_dim // 2
            centres = QueryCentres(np.zeros((*shape, group.head_dim)), np.zeros((*shape, bands)))
        else:
            centres = query_centres(statistics, group)
        state[f"centre{group.suffix}"], state[f"magnitude{group.suffix}"] = centres.mean, centres.magnitude
    return {name: array[:, None].astype(np.float32) for name, array in state.items()}


def _metadata(config: CompileConfig, model: Identity) -> dict[str, str]:
    return {
        "keysieve": __version__,
        "architecture": str(model["architecture"]),
        "eviction": json.dumps(asdict(config.eviction), sort_keys=True),
    }


def _node_counts(graph: Graph) -> dict[str, int]:
    """How many of each plugin node the rewritten graph holds."""
    counts = {}
    for node in NODES:
        operator = getattr(torch.ops.keysieve, node.name.removeprefix("KeySieve").lower()).default
        counts[node.name] = len(graph.calls(operator))
    return counts


def _manifest(
    model: Any,
    tokenizer: Any,
    config: CompileConfig,
    model_identity: Identity,
    sizes: dict[str, Any],
    layout: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    eviction = config.eviction
    text_config = model.config.get_text_config()
    return {
        "keysieve": __version__,
        "target": config.target,
        "model": model_identity,
        "sizes": sizes,
        "dtype": config.dtype,
        "weights": config.weights or config.dtype,
        "kv_dtype": config.cache_dtype,
        "inlined": config.inline,
        "vocab_size": int(text_config.vocab_size),
        "position_limit": getattr(text_config, "max_position_embeddings", None),
        "stop_tokens": _stop_tokens(model, tokenizer),
        "eviction": asdict(eviction),
        "layers": [asdict(layer) for layer in report.layers],
        "nodes": report.nodes,
        "without": report.without,
        **layout,
        **({"quantized": report.quantized} if report.quantized else {}),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
    }


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """End tokens of the generation config, the model config and the tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        tokens = getattr(source, "eos_token_id", None)
        if tokens is not None:
            found.update([tokens] if isinstance(tokens, int) else tokens)
    return sorted(found)


def _dump(folder: Path, name: str, graph: Graph) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(str(graph.fx), encoding="utf-8")
    except OSError as error:
        raise CaptureError(f"cannot write graphs to {folder}: {error.strerror}") from error
