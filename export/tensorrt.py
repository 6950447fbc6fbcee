"""export to TensorRT: engine plans with the eviction plugins inside, or all that is needed to build one elsewhere.

TensorRT-RTX builds plans on a machine without a GPU. Ordinary TensorRT needs the GPU it builds for; where it is not
installed, the export is the ONNX file for its parser, the plugin library and a script.
"""

import ctypes
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from keysieve.errors import ExportError
from keysieve.kernels.triton.aot import machine_code_runs
from keysieve.kernels.triton.configuration import MAX_CAPACITY
from keysieve.plugins.contract import DOMAIN, NODES, UPDATE

PARSER_MODEL = "model.tensorrt.onnx"
LIBRARY = "libkeysieve_tensorrt.so"
RTX_MODULE, TENSORRT_MODULE = "tensorrt_rtx", "tensorrt"
FOLD_LIMIT = 64  # elements; shapes and axes, never weights
# A layer of the build log, and the caches among what it reads; the second profile's names say so.
_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (?:Constants|Outputs):", re.MULTILINE
)
_CACHE = re.compile(r"Name: (?:key|value)_\d+(?:_next)?(?P<profile> \[profile 1\])?,")
Report = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True)
class Limits:
    """What an engine is built to serve: `batch` sequences, `capacity` rows, `chunk` new tokens in one step.

    `typical` is the capacity that its kernels are chosen for, None for half of the greatest. `windows` are the rows of
    the caches of each sliding window.
    """

    batch: int = 8
    capacity: int = 4096
    chunk: int = 512
    typical: int | None = None
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "capacity", "chunk"):
            if getattr(self, name) < 1:
                raise ExportError(f"{name} is {getattr(self, name)}; an engine needs at least 1")
        if self.capacity > MAX_CAPACITY:
            raise ExportError(
                f"capacity {self.capacity} is beyond the {MAX_CAPACITY:,} rows that the GPU kernels address"
            )
        if self.chunk > self.capacity:
            raise ExportError(f"chunk {self.chunk} is more than capacity {self.capacity}; lower the chunk")
        if self.typical is not None and not 1 <= self.typical <= self.capacity:
            raise ExportError(f"typical capacity {self.typical} is not between 1 and capacity {self.capacity}")

    def profiles(self) -> dict[str, dict[str, tuple[int, int, int]]]:
        """Least, typical and most of every dynamic dimension: for decoding, and for prefilling."""
        common = {
            "batch": (1, 1, self.batch),
            "capacity": (1, self.typical or -(-self.capacity // 2), self.capacity),
            **{f"window_{index}": (1, rows, rows) for index, rows in enumerate(self.windows)},
        }
        return {
            "decode": {**common, "tokens": (1, 1, 1), "wanted": (0, 1, 1)},
            "prefill": {**common, "tokens": (1, self.chunk, self.chunk), "wanted": (0, 1, self.chunk)},
        }

    def shapes(self, model: Path) -> list[dict[str, list[tuple[int, ...]]]]:
        """For each profile, of every input of the ONNX file `model`: least, typical and greatest shape."""
        inputs = onnx.load(str(model), load_external_data=False).graph.input
        named = {i.name: [size.dim_param or size.dim_value for size in i.type.tensor_type.shape.dim] for i in inputs}
        return [
            {
                name: list(zip(*(bounds.get(size, (size,) * 3) for size in sizes), strict=True))
                for name, sizes in named.items()
            }
            for bounds in self.profiles().values()
        ]


@dataclass(frozen=True)
class Plan:
    """A built engine plan, and what its build log says.

    layers: name -> kind of every layer that runs, both profiles. plugins: those that are ours. attention: fused
    attention kernels. cache_copies: by profile, layers other than these that read a cache, so to copy or rearrange it.
    """

    path: Path
    architecture: int
    seconds: float
    size: int
    layers: dict[str, str] = field(repr=False)
    plugins: list[str] = field(repr=False)
    attention: list[str] = field(repr=False)
    cache_copies: dict[str, list[str]]


# -- the ONNX file as TensorRT's parser wants it -----------------------------------------------------------------------


def write_parser_model(model: Path) -> Path:
    """Write model.tensorrt.onnx beside `model`, with the same weights file; returns it.

    The parser wants axes and shapes as constants, where the exporter leaves arithmetic on constants. The function
    bodies go, since the plugins take their place, and the plugin nodes get names that messages can use.
    """
    try:
        proto = onnx.load(str(model), load_external_data=False)
    except (OSError, ValueError) as error:
        raise ExportError(f"{model} cannot be read: {error}") from error
    del proto.functions[:]
    graph = ir.serde.deserialize_model(proto)
    _fold_constants(graph)
    for node in graph.graph:
        if node.domain == DOMAIN:
            layer = f".{_name(node.inputs[5]).removeprefix('key_')}" if node.op_type == UPDATE.name else ""
            node.name = f"{node.op_type}{layer}"
    output = model.with_name(PARSER_MODEL)
    onnx.save(ir.serde.serialize_model(graph), str(output))
    return output


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or ""


def _fold_constants(model: ir.Model) -> None:
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    def may_fold(node: ir.Node) -> bool | None:
        weights = any(i is not None and isinstance(i.const_value, ir.ExternalTensor) for i in node.inputs)
        return False if weights else None

    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports every weight that it does not load
    try:
        fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=may_fold,
        )
    finally:
        logger.setLevel(level)
    common.RemoveUnusedNodesPass()(model)


# -- building ----------------------------------------------------------------------------------------------------------


def build_rtx_plan(
    model: Path,
    library: Path,
    output: Path,
    architecture: int,
    limits: Limits,
    report: Report | None = None,
) -> Plan:
    """Build a TensorRT-RTX plan for one GPU architecture (80, 86, 89, 120) on any machine; write it to `output`.

    model: what write_parser_model wrote. library: the plugin library, which is embedded in the plan. The build log is
    written beside the plan, as `.log`, also when the build fails.
    Raises ExportError before any long work where TensorRT-RTX, the library or the architecture does not fit, and
    with TensorRT's own message where parser or builder refuse.
    """
    trt = import_rtx()
    check_rtx_architecture(trt, architecture)
    check_library(library, [architecture])
    return _build(trt, model, library, output, architecture, limits, report)


def check_rtx_architecture(trt: Any, architecture: int) -> None:
    """Raise ExportError unless TensorRT-RTX builds plans for that GPU architecture."""
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    if architecture not in known:
        raise ExportError(
            f"TensorRT-RTX {trt.__version__} builds for SM {', '.join(map(str, known))}, not {architecture}; for "
            "others use target tensorrt on a machine with that GPU"
        )


def build_tensorrt_plan(model: Path, library: Path, output: Path, limits: Limits, report: Report | None = None) -> Plan:
    """The same with ordinary TensorRT, for the GPU of this machine; untested without one."""
    if find_spec(TENSORRT_MODULE) is None:
        raise ExportError(
            "ordinary TensorRT is not installed (module tensorrt); `write_kit` makes what builds elsewhere"
        )
    import tensorrt as trt

    if not hasattr(trt, "IPluginV3OneBuildV2"):
        raise ExportError(f"TensorRT {trt.__version__} has no plugins with aliased outputs; install 10.3 or newer")
    check_library(library, [])
    return _build(trt, model, library, output, 0, limits, report)


def import_rtx() -> Any:
    """The module tensorrt_rtx, with its parser able to find its library.

    The ONNX parser loads `libtensorrt_rtx.so`, a name that the wheel lacks, and ends the process if there is none.
    """
    if find_spec(RTX_MODULE) is None or find_spec("tensorrt_rtx_libs") is None:
        raise ExportError(
            "TensorRT-RTX is not installed (modules tensorrt_rtx and tensorrt_rtx_libs); "
            "`pip install keysieve[tensorrt]`"
        )
    import tensorrt_rtx as trt
    import tensorrt_rtx_libs

    if tuple(map(int, trt.__version__.split(".")[:2])) < (1, 7):
        raise ExportError(
            f"TensorRT-RTX {trt.__version__} refuses plugins in its ONNX parser; install tensorrt-rtx-cu13==1.7.1.116"
        )
    folder = Path(tensorrt_rtx_libs.__file__).parent
    link, target = folder / "libtensorrt_rtx.so", folder / "libtensorrt_rtx.so.1"
    searched = [Path(p) / link.name for p in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if p]
    if not any(path.exists() for path in (link, *searched)):
        try:
            link.symlink_to(target.name)
        except FileExistsError:
            pass  # another process was faster
        except OSError as error:
            raise ExportError(
                f"TensorRT-RTX's ONNX parser needs the file {link}, which cannot be made ({error.strerror}); run "
                f"`ln -s {target.name} {link}` as the owner of that folder, or put a link of that name in a folder on "
                "LD_LIBRARY_PATH"
            ) from error
    return trt


def check_library(library: Path, architectures: Sequence[int]) -> dict[str, Any]:
    """The description inside a plugin library, checked to be of this version and to have kernels for these GPUs."""
    if not library.is_file():
        raise ExportError(f"no plugin library at {library}; `keysieve plugin build` makes it")
    try:
        loaded = ctypes.CDLL(str(library.resolve()))
        loaded.keysieve_description.restype = ctypes.c_char_p
        described: dict[str, Any] = json.loads(loaded.keysieve_description())
    except (OSError, AttributeError, ValueError) as error:
        raise ExportError(f"{library} is no plugin library of keysieve: {error}") from error
    nodes = {node.name: node.version for node in NODES}
    if described["nodes"] != nodes:
        raise ExportError(
            f"plugin library {library} implements {described['nodes']}, this keysieve exports {nodes}; build it again "
            "with `keysieve plugin build`"
        )
    for architecture in architectures:
        cubins = [built for built in described["cubins"] if built == architecture or built not in described["exact"]]
        cubin = any(machine_code_runs(built, architecture) for built in cubins)
        if not cubin and not any(built <= architecture for built in described["ptx"]):
            raise ExportError(
                f"plugin library {library} has kernels for sm_{', sm_'.join(map(str, described['cubins']))} and no PTX "
                f"that sm_{architecture} can run; build it again with `--arch {architecture}`"
            )
    return described


def _build(
    trt: Any, model: Path, library: Path, output: Path, architecture: int, limits: Limits, report: Report | None
) -> Plan:
    start = time.perf_counter()
    log = _logger(trt)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        plan = _serialise(trt, log, model, library, architecture, limits, report)
    finally:
        output.with_suffix(".log").write_text("".join(log.kept), encoding="utf-8")
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.write_bytes(plan)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    found = list(_LAYER.finditer("".join(log.kept)))
    layers = {layer["name"]: layer["kind"] for layer in found}
    plugins = [name for name in layers if name.startswith(tuple(node.name for node in NODES))]
    attention = [name for name in layers if "_mha_" in name]
    copies: dict[str, list[str]] = {profile: [] for profile in limits.profiles()}
    decode, prefill = copies
    for layer in found:
        reads = _CACHE.search(layer["inputs"])
        if reads and layer["kind"] != "NoOp" and layer["name"] not in (*plugins, *attention):
            copies[prefill if reads["profile"] else decode].append(layer["name"])
    return Plan(
        path=output,
        architecture=architecture,
        seconds=time.perf_counter() - start,
        size=output.stat().st_size,
        layers=layers,
        plugins=plugins,
        attention=attention,
        cache_copies=copies,
    )


def _serialise(
    trt: Any, log: Any, model: Path, library: Path, architecture: int, limits: Limits, report: Report | None
) -> Any:
    _said_by(library)  # forget what was said before
    builder = trt.Builder(log)
    builder.get_plugin_registry().load_library(str(library.resolve()))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise ExportError(f"TensorRT's parser refuses {model}: {errors}{_said_by(library)}")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the documented way from ILayer to a layer of its kind
            layer.attention.decomposable = True  # plain operations where there is no fused kernel, as for float32
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.set_flag(trt.BuilderFlag.DISABLE_TIMING_CACHE)  # the same plan every time
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names in log and profiles
    config.plugins_to_serialize = [str(library.resolve())]
    if architecture:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{architecture}"), 0)
    for shapes in limits.shapes(model):
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is None:
        raise ExportError(f"TensorRT could not build {model}: {log.last_error or 'see the log'}{_said_by(library)}")
    return plan


def _said_by(library: Path) -> str:
    """What a plugin reported last, if anything."""
    loaded = ctypes.CDLL(str(library.resolve()))
    loaded.keysieve_last_error.restype = ctypes.c_char_p
    said = (loaded.keysieve_last_error() or b"").decode(errors="replace")
    return f"; {said}" if said else ""


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps what is worth keeping: everything but VERBOSE, and of that the list of layers."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[str] = []
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rsplit(".", 1)[-1]
            if name != "VERBOSE" or message.startswith("Layers:"):
                self.kept.append(f"{name}: {message}\n")
            if name in ("ERROR", "INTERNAL_ERROR"):
                self.last_error = message

    return Log()


def _monitor(trt: Any, report: Report | None) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Passes progress on. An exception in `report` (Ctrl-C too) stops the build and is raised after it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            if report is not None and self.stopped is None:
                try:
                    report(name, step + 1, self.steps.get(name, 0))
                except BaseException as error:  # noqa: BLE001  (no exception may pass through TensorRT)
                    self.stopped = error
            return self.stopped is None

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()
