"""A stand-in for TensorRT: contexts that take shapes and addresses as TensorRT's do, and compute with ONNX Runtime.

A "plan" is a file that holds the path of an ONNX file. `calls` counts what was set and run, by profile.
"""

import ctypes
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

TYPES = {f"tensor({name})": np.dtype(kind) for name, kind in (("float", "f4"), ("int32", "i4"), ("int64", "i8"))}


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The memory at that address as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class Context:
    """An execution context; it refuses what `refused` names."""

    def __init__(self, session: ort.InferenceSession, calls: Counter, refused: set[str]) -> None:
        self.session, self.calls, self.refused = session, calls, refused
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = -1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return "profile" not in self.refused

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name not in self.refused

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls["addresses", self.profile] += 1
        self.addresses[name] = address
        return f"address of {name}" not in self.refused

    def execute_async_v3(self, stream: int) -> bool:
        if "run" in self.refused:
            return False
        self.calls["runs", self.profile] += 1
        feeds = {
            given.name: at(self.addresses[given.name], self.shapes[given.name], TYPES[given.type])
            for given in self.session.get_inputs()
        }
        assert (feeds["input_ids"].shape[1] == 1) == (self.profile == 0)
        outputs = [output.name for output in self.session.get_outputs()]
        for name, value in zip(outputs, self.session.run(outputs, feeds), strict=True):
            at(self.addresses[name], value.shape, value.dtype)[...] = value
        return True


class TensorRT:
    """What stands for the module, its runtime and its engine."""

    __version__ = "0.0"
    engine_host_code_allowed = False

    class Logger:
        WARNING = 1

        def __init__(self, severity: int) -> None:
            pass

    def __init__(self, *refused: str) -> None:
        self.calls: Counter = Counter()
        self.refused = set(refused)

    def Runtime(self, logger: Any) -> "TensorRT":
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> "TensorRT | None":
        if "plan" in self.refused or not self.engine_host_code_allowed:
            return None
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(plan.decode(), options, providers=["CPUExecutionProvider"])
        return self

    def create_execution_context(self) -> Context:
        return Context(self.session, self.calls, self.refused)


def with_plan(bundle: Path, folder: Path, limits: dict[str, int]) -> dict[str, Any]:
    """Write the stand-in's plan of `bundle` to `folder`; returns the manifest's entry on it."""
    (folder / "model.plan").write_text(str(bundle / "model.onnx"))
    return {"limits": limits, "plans": [{"file": "model.plan", "architecture": 0}]}
