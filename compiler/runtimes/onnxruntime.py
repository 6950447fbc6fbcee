"""ONNX Runtime on a CPU, with buffers that are numpy arrays.

With the custom-op library of keysieve.plugins.onnxruntime it runs the bundle's model.onnxruntime.onnx; without it,
model.onnx and the function bodies in it.
"""

import gc
import logging
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from keysieve.compiler.bundle import Bundle
from keysieve.compiler.session import Session
from keysieve.errors import BundleError, EngineError
from keysieve.plugins.onnxruntime.build import find_library

DTYPES = ("float32", "float16")
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which numpy does not know

log = logging.getLogger("keysieve")


class HostBuffer:
    """A numpy array, and the OrtValue that refers to its memory."""

    def __init__(self, array: np.ndarray, bfloat16: bool = False):
        self.array = array
        self.nbytes = array.nbytes
        value = ort.OrtValue
        self.value = (
            value.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16) if bfloat16 else value.ortvalue_from_numpy(array)
        )


class OnnxBinding:
    """A Binding over ONNX Runtime's IOBinding."""

    def __init__(self, session: ort.InferenceSession):
        self._session = session
        self._binding = session.io_binding()

    def zeros(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        bfloat16 = dtype == "bfloat16"
        kind = np.dtype(np.uint16 if bfloat16 else dtype)
        try:
            return HostBuffer(np.zeros(shape, kind), bfloat16)
        except (MemoryError, ValueError) as error:  # ValueError: more bytes than a number holds
            size, bytes_needed = " x ".join(map(str, shape)), prod(shape) * kind.itemsize
            raise EngineError(
                f"no memory for a buffer of {bytes_needed:,} bytes ({size} {dtype}); "
                "ask for fewer sequences, or a smaller capacity or budget"
            ) from error

    def buffer(self, value: np.ndarray) -> HostBuffer:
        return HostBuffer(value)

    def input(self, name: str, buffer: HostBuffer) -> None:
        self._binding.bind_ortvalue_input(name, buffer.value)

    def output(self, name: str, buffer: HostBuffer) -> None:
        self._binding.bind_ortvalue_output(name, buffer.value)

    def feed(self, name: str, value: np.ndarray) -> None:
        self._binding.bind_cpu_input(name, value)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def close(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        gc.collect()


class OnnxRuntime:
    """A Runtime for a bundle's ONNX file.

    threads: intra-op threads (None: the cores that the process may use). native: run with the custom-op library (None:
    where it was built). Raises EngineError for a dtype that it cannot run or a library that cannot be used, BundleError
    where ONNX Runtime cannot load the file.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, native: bool | None = None):
        if bundle.manifest["dtype"] not in DTYPES:
            raise EngineError(
                f"{bundle.path}: ONNX Runtime on a CPU has no kernels for {bundle.manifest['dtype']}; "
                "compile with --dtype float32 or float16 to run here"
            )
        options = ort.SessionOptions()
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}; it must be at least 1")
        options.intra_op_num_threads = threads or _usable_cores()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # it keeps a block for each shape of a step, and no step is faster
        self.library = None if native is False else find_library()
        model = bundle.model
        if self.library is not None:
            _register(options, self.library)
            model = bundle.native_model or model
        elif native:
            raise EngineError(f"the custom-op library was not built; {_BUILD}")
        elif native is None:
            log.warning("running without keysieve's custom ops, which is slower; %s", _BUILD)
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise BundleError(f"{model}: ONNX Runtime cannot load it: {error}") from error

    def check(self, batch: int, capacity: int, chunk: int) -> None:
        """Every size is fine."""

    def chunk(self, batch: int) -> None:
        return None

    def session(self, *sizes: Any) -> Session:
        return Session(self.binding(), *sizes)

    def binding(self) -> OnnxBinding:
        return OnnxBinding(self._session)


def _usable_cores() -> int:
    """How many cores the process is kept to; 0, ONNX Runtime's own choice, where it may use all."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return usable if usable != os.cpu_count() else 0


_BUILD = "`keysieve plugin build --ort` builds it (it needs a C++ compiler)"


def _register(options: ort.SessionOptions, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # as above
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot use {library}: {error}; {_BUILD}") from error
