"""The TensorRT targets of `compile`: the plugin library, then engine plans, or the kit that builds one elsewhere."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from keysieve.compiler.config import CompileConfig, TensorRTConfig
from keysieve.compiler.progress import Progress
from keysieve.compiler.rows import window_rows
from keysieve.errors import ConfigError
from keysieve.export.tensorrt import (
    LIBRARY,
    TENSORRT_MODULE,
    Limits,
    Plan,
    build_rtx_plan,
    build_tensorrt_plan,
    check_rtx_architecture,
    import_rtx,
    write_parser_model,
)
from keysieve.export.tensorrt_kit import write_kit
from keysieve.kernels.triton.aot import ARCHITECTURES, PORTABLE, build, check_triton, machine_code_for
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.passes.graph import Graph
from keysieve.plugins.contract import SCORE, SELECT
from keysieve.plugins.cxx import find_compiler
from keysieve.plugins.tensorrt.build import build_library

NODES = ("score", "select", "update")
RTX_ARCHITECTURES = (80, 86, 89, 120)  # GPUs that TensorRT-RTX and the kernels share, but for variants


def check_tensorrt(config: CompileConfig) -> Limits:
    """What the plans will serve. Raises, before any work, where a TensorRT target of `config` cannot be built here."""
    options, eviction = config.tensorrt, config.eviction
    most = eviction.budget + eviction.interval
    room = eviction.budget + max(eviction.interval, options.chunk)
    limits = Limits(options.batch, options.capacity or room, options.chunk)
    if limits.capacity < most:
        raise ConfigError(
            f"capacity {limits.capacity} is less than the {most} rows of budget {eviction.budget} and interval "
            f"{eviction.interval}; raise it, or lower them"
        )
    for architecture in options.architectures or ():
        machine_code_for(architecture)
    check_triton()
    find_compiler()
    if config.target == "tensorrt-rtx":
        trt = import_rtx()
        for architecture in options.architectures or ():
            check_rtx_architecture(trt, architecture)
    return limits


def window_capacities(config: CompileConfig, sizes: list[int]) -> tuple[int, ...]:
    """Rows of the caches of windows of so many tokens, with room for the largest step."""
    room = max(config.eviction.interval, config.tensorrt.chunk)
    return tuple(window_rows(size, room) for size in sizes)


def kernel_configuration(graph: Graph, dtype: str) -> KernelConfiguration:
    """What the GPU kernels of an engine graph are built for. Raises ConfigError for what they cannot do."""
    scores, selects, updates = (graph.calls(getattr(torch.ops.keysieve, op).default) for op in NODES)
    if not scores:
        raise ConfigError(
            "no layer of the model evicts (each keeps its sliding window), so the plugin has nothing to do; compile it "
            "for --target onnxruntime"
        )
    if graph.calls(torch.ops.keysieve.linear_attention.default):
        raise ConfigError(
            "the model has layers of linear attention or state space, for which the plugin library has no kernel; "
            "compile it for --target onnxruntime"
        )
    if len(scores) > 1:
        raise ConfigError(
            f"layers that evict have {len(scores)} shapes (query heads, KV heads, head dim, rotary dim); the plugin "
            "library has kernels for one; compile it for --target onnxruntime"
        )
    (score,), (select,), update = scores, selects, updates[0]
    shapes = {str([graph.shape(node.args[place])[axis] for place in (5, 6) for axis in (1, 3)]) for node in updates}  # type: ignore[arg-type]
    if len(shapes) > 1:
        raise ConfigError(
            f"caches of this model have different KV heads or head sizes ({', '.join(sorted(shapes))}); the plugin "
            "library has kernels for one shape; compile it for --target onnxruntime"
        )
    attributes: dict[str, Any] = {}
    for node, call in ((SCORE, score), (SELECT, select)):
        attributes |= dict(zip(node.attributes, call.args[len(node.required) :], strict=True))
    *_, centre, _, keys = score.args[: len(SCORE.inputs)]
    key, value = (graph.shape(argument) for argument in update.args[5:7])  # type: ignore[arg-type]
    return KernelConfiguration.of_nodes(
        attributes,
        layers=len(keys),  # type: ignore[arg-type]
        head_dim=int(key[3]),
        value_dim=int(value[3]),
        offsets=int(graph.shape(centre)[3]),  # type: ignore[arg-type]
        dtype=dtype,
    )


def write_library(
    configuration: KernelConfiguration, options: TensorRTConfig, output: Path, progress: Progress
) -> None:
    """Build the plugin library with kernels for the architectures of `options`, and PTX for later ones."""
    built = sorted({PORTABLE, *map(machine_code_for, options.architectures or ARCHITECTURES)})
    with progress.stage("kernels") as stage:
        artifacts = build(configuration, built)
        stage.note(f"{len(artifacts)}, for sm_{', sm_'.join(map(str, built))}")
    with progress.stage("plugin library") as stage:
        build_library(configuration, artifacts, output, aliased=options.aliased, tensorrt_include=options.include)
        stage.note(f"{output.stat().st_size / 1e3:,.0f} kB")


def write_plans(folder: Path, model: Path, config: CompileConfig, limits: Limits, progress: Progress) -> dict[str, Any]:
    """Plans, or the kit, into `folder`, which holds the plugin library already; returns the manifest's entry.

    model: the exported ONNX file in `folder`.
    """
    library, parsed = folder / LIBRARY, write_parser_model(model)
    plans: list[Plan] = []
    if config.target == "tensorrt-rtx":
        for architecture in config.tensorrt.architectures or RTX_ARCHITECTURES:
            with progress.stage(f"plan sm_{architecture}") as stage, progress.bar() as report:
                plan = folder / f"model.sm{architecture}.plan"
                plans.append(build_rtx_plan(parsed, library, plan, architecture, limits, report))
                stage.note(describe(plans[-1]))
    elif find_spec(TENSORRT_MODULE) is not None:
        with progress.stage("plan") as stage, progress.bar() as report:
            plans.append(build_tensorrt_plan(parsed, library, folder / "model.plan", limits, report))
            stage.note(describe(plans[-1]))
    else:
        with progress.stage("kit") as stage:
            written = write_kit(parsed, library, limits)
            stage.note(f"TensorRT is not installed here; {' or '.join(file.name for file in written)} builds the plan")
    return {
        "limits": asdict(limits),
        "aliased": config.tensorrt.aliased,
        "plans": [
            {
                "file": plan.path.name,
                "architecture": plan.architecture,
                "bytes": plan.size,
                "plugin_layers": len(plan.plugins),
                "fused_attention_layers": len(plan.attention),
                "cache_copies": plan.cache_copies,
            }
            for plan in plans
        ],
    }


def describe(plan: Plan) -> str:
    """ "290 MB, 64 plugin layers, 60 fused attentions", and where caches are copied."""
    text = f"{plan.size / 1e6:,.0f} MB, {len(plan.plugins)} plugin layers, {len(plan.attention)} fused attentions"
    copies = plan.cache_copies.items()
    return ", ".join([text, *(f"{len(layers)} cache copies in profile {name}" for name, layers in copies if layers)])
