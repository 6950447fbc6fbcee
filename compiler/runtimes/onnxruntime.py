"""ONNX Runtime on a CPU: runs every bundle's model.onnx, with buffers that are numpy arrays."""

import gc

import numpy as np
import onnxruntime as ort

from keysieve.compiler.bundle import Bundle
from keysieve.errors import BundleError, EngineError

DTYPES = ("float32", "float16")


class HostBuffer:
    """A numpy array, and the OrtValue that refers to its memory."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.nbytes = array.nbytes
        self.value = ort.OrtValue.ortvalue_from_numpy(array)


class OnnxBinding:
    """A Binding over ONNX Runtime's IOBinding."""

    def __init__(self, session: ort.InferenceSession):
        self._session = session
        self._binding = session.io_binding()

    def zeros(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(np.zeros(shape, np.dtype(dtype)))

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
    """A Runtime for a bundle's ONNX file. threads: intra-op threads (None: all cores).

    Raises EngineError for a dtype that it cannot run, BundleError where ONNX Runtime cannot load the file.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None):
        if bundle.manifest["dtype"] not in DTYPES:
            raise EngineError(
                f"{bundle.path}: ONNX Runtime on a CPU has no kernels for {bundle.manifest['dtype']}; "
                "compile with --dtype float32 or float16 to run here"
            )
        options = ort.SessionOptions()
        if threads is not None:
            if threads < 1:
                raise EngineError(f"threads is {threads}; it must be at least 1")
            options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(bundle.model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise BundleError(f"{bundle.model}: ONNX Runtime cannot load it: {error}") from error

    def check(self, batch: int, capacity: int, chunk: int) -> None:
        """Every size is fine."""

    def binding(self) -> OnnxBinding:
        return OnnxBinding(self._session)
