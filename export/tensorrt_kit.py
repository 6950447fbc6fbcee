"""What builds a plan with ordinary TensorRT on another machine: a trtexec line and a Python script beside the model."""

from pathlib import Path

from keysieve.export.tensorrt import Limits

SHELL, SCRIPT = "build_tensorrt_plan.sh", "build_tensorrt_plan.py"

_SCRIPT = '''\
"""Build model.plan from {model} for the GPU of this machine; needs a `tensorrt` whose ONNX parser has Attention."""

import sys
from pathlib import Path

import tensorrt as trt

HERE = Path(__file__).resolve().parent
LIBRARY = str(HERE / "{library}")
# One profile each for decoding and prefilling: input -> least, typical and greatest shape.
PROFILES = {profiles}

logger = trt.Logger(trt.Logger.INFO)
builder = trt.Builder(logger)
builder.get_plugin_registry().load_library(LIBRARY)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(str(HERE / "{model}")):
    sys.exit("; ".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
for index in range(network.num_layers):
    layer = network.get_layer(index)
    if layer.type == trt.LayerType.ATTENTION_INPUT:
        layer.__class__ = trt.IAttentionInputLayer
        layer.attention.decomposable = True  # plain operations where there is no fused kernel, as for float32
config = builder.create_builder_config()
config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
config.plugins_to_serialize = [LIBRARY]
for shapes in PROFILES:
    profile = builder.create_optimization_profile()
    for name, (least, typical, most) in shapes.items():
        profile.set_shape(name, least, typical, most)
    config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
if plan is None:
    sys.exit("TensorRT could not build the plan; its messages are above")
(HERE / "model.plan").write_bytes(plan)
'''


def write_kit(model: Path, library: Path, limits: Limits) -> list[Path]:
    """Write build_tensorrt_plan.sh and .py into the folder of `model`, where the library lies too; returns both.

    model: what write_parser_model wrote.
    """
    shell, script = model.with_name(SHELL), model.with_name(SCRIPT)
    line = trtexec_line(model, library, limits)
    note = f"# float32 needs {SCRIPT} instead: trtexec insists on fused attention."
    shell.write_text(f'#!/bin/sh\n{note}\ncd "$(dirname "$0")" && {line}\n')
    shell.chmod(0o755)
    rows = []
    for shapes in limits.shapes(model):
        lines = [f"        {name!r}: {bounds!r},\n" for name, bounds in shapes.items()]
        rows.append(f"    {{\n{''.join(lines)}    }},\n")
    profiles = f"[\n{''.join(rows)}]"
    script.write_text(_SCRIPT.format(model=model.name, library=library.name, profiles=profiles))
    return [shell, script]


def trtexec_line(model: Path, library: Path, limits: Limits, output: str = "model.plan") -> str:
    """The command that builds the plan with trtexec, run in the folder of `model`."""
    lines = [
        f"trtexec --onnx={model.name}",
        f"--dynamicPlugins=./{library.name} --setPluginsToSerialize=./{library.name}",
        "--stronglyTyped --preview=+aliasedPluginIO1003 --profilingVerbosity=detailed",
    ]
    for index, shapes in enumerate(limits.shapes(model)):
        bounds = []
        for place, bound in enumerate(("min", "opt", "max")):
            described = ",".join(f"{name}:{'x'.join(map(str, sizes[place]))}" for name, sizes in shapes.items())
            bounds.append(f"--{bound}Shapes={described}")
        lines.append(f"--profile={index} {' '.join(bounds)}")
    return " \\\n  ".join([*lines, f"--saveEngine={output}"])
