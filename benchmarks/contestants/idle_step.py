"""What eviction costs in a step that is not due: the nodes between caches and plans, in a model of their own."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from keysieve.compiler.bundle import Bundle
from keysieve.export.when_due import only_for
from keysieve.plugins.onnxruntime.build import find_library

RUNS, TURNS = 200, 5


def idle_microseconds(bundle: Bundle, batch: int, capacity: int) -> float:
    """CPU microseconds of a bundle's scores and plans where nothing is due, above those of an empty model; one thread.

    capacity: rows of the caches, half of which are held.
    """
    model = ir.load(bundle.native_model or bundle.model)
    plans = [v for v in model.graph.outputs if v.name.startswith(("plan", "keep", "evicted"))]
    given = _given(only_for(model.graph, outputs=plans))
    model.graph = ir.convenience.extract(model.graph, given, plans)
    numbers = {"limit": capacity, "budget": capacity, "length_next": capacity // 2, "position": capacity // 2}
    feeds = {}
    for value in given:
        if value.shape is None:  # a size that the model computes: the batch
            value.shape = ir.Shape([1])
            numbers[value.name] = batch
        sizes = [size if isinstance(size, int) else batch for size in value.shape]
        if value.name.startswith("key_"):
            sizes[2] = capacity
        feeds[value.name] = np.full(sizes, numbers.get(value.name, 1), value.dtype.numpy())
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT32))
    same = ir.node("Identity", [x])
    empty = ir.Model(ir.Graph([x], same.outputs, nodes=[same], opset_imports={"": 24}, name="empty"), ir_version=10)
    with TemporaryDirectory() as folder:
        full = _seconds(model, feeds, Path(folder) / "model.onnx")
        none = _seconds(empty, {"x": np.ones(1, np.int32)}, Path(folder) / "empty.onnx")
        return 1e6 * statistics.median(full() - none() for _ in range(TURNS))


def _given(nodes: set[ir.Node]) -> list[ir.Value]:
    """What these take from elsewhere and is not constant."""
    values = [value for node in nodes for value in node.inputs if value is not None]
    outside = [value for value in values if value.producer() not in nodes and not _constant(value)]
    return sorted(dict.fromkeys(outside), key=lambda value: value.name)


def _constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() if node is None else all(map(_constant, filter(None, node.inputs)))


def _seconds(model: ir.Model, feeds: dict[str, np.ndarray], file: Path) -> Callable[[], float]:
    """A function that measures the CPU seconds of a run."""
    ir.save(ir.external_data.load_to_model(model), file)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    library = find_library()
    if library:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def measure() -> float:
        started = time.process_time()
        for _ in range(RUNS):
            session.run_with_iobinding(binding)
        return (time.process_time() - started) / RUNS

    return measure
