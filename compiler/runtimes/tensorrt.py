"""TensorRT and TensorRT-RTX: run a bundle's plan on an NVIDIA GPU, with buffers that are torch tensors.

Nothing here was run on a GPU yet; the tests run it on a stand-in for TensorRT that computes with ONNX Runtime.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from keysieve.compiler.bundle import Bundle
from keysieve.compiler.session import Session
from keysieve.errors import EngineError

DECODE, PREFILL = 0, 1  # the profiles, in the order of keysieve.export.tensorrt.Limits


class DeviceBuffer:
    """A tensor on the device."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    @property
    def array(self) -> np.ndarray:
        return self.tensor.cpu().numpy()

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class PlanBinding:
    """A Binding with one execution context for decoding and one for prefilling."""

    def __init__(self, engine: Any, device: str):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device != "cpu" else None
        self._contexts = [engine.create_execution_context() for _ in (DECODE, PREFILL)]
        for profile, context in enumerate(self._contexts):
            if not context.set_optimization_profile_async(profile, self.stream):
                raise EngineError(f"TensorRT has no profile {profile} in the plan; compile the bundle again")
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._fed: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._set: list[dict[str, tuple[int, tuple[int, ...]]]] = [{}, {}]

    @property
    def stream(self) -> int:
        """The CUDA stream's handle."""
        return self._stream.cuda_stream if self._stream is not None else 0

    def zeros(self, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        return DeviceBuffer(torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device))

    def buffer(self, value: np.ndarray) -> DeviceBuffer:
        return DeviceBuffer(torch.tensor(value, device=self._device))

    def input(self, name: str, buffer: DeviceBuffer) -> None:
        self._inputs[name] = buffer.tensor

    def output(self, name: str, buffer: DeviceBuffer) -> None:
        self._outputs[name] = buffer.tensor

    def feed(self, name: str, value: np.ndarray) -> None:
        # One tensor a name and shape: an address that stays the same can be captured in a CUDA graph.
        key = (name, value.shape)
        if key not in self._fed:
            self._fed[key] = torch.empty(value.shape, dtype=torch.from_numpy(value).dtype, device=self._device)
        self._fed[key].copy_(torch.from_numpy(value))
        self._inputs[name] = self._fed[key]

    def context(self) -> Any:
        """The execution context for what is bound now, with all addresses and shapes set."""
        profile = DECODE if self._inputs["input_ids"].shape[1] == 1 else PREFILL
        context, known = self._contexts[profile], self._set[profile]
        for tensors, is_input in ((self._inputs, True), (self._outputs, False)):
            for name, tensor in tensors.items():
                state = (tensor.data_ptr(), tuple(tensor.shape))
                if known.get(name) == state:
                    continue
                if is_input and not context.set_input_shape(name, tuple(tensor.shape)):
                    raise EngineError(f"the plan does not take {name} of shape {list(tensor.shape)}")
                if not context.set_tensor_address(name, tensor.data_ptr()):
                    raise EngineError(f"the plan has no tensor {name}; compile the bundle again")
                known[name] = state
        return context

    def run(self) -> None:
        context = self.context()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the copies of what was fed
        if not context.execute_async_v3(self.stream):
            raise EngineError("TensorRT could not run the plan; its log says why")
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        self._inputs.clear()
        self._outputs.clear()
        self._fed.clear()


class PlanRuntime:
    """A Runtime for the plan of a bundle that fits the GPU of this machine.

    Raises EngineError, before anything is loaded, where the bundle has no plan for the GPU, or TensorRT or the GPU is
    missing.
    """

    def __init__(self, bundle: Bundle, device: str = "cuda", trt: Any = None):
        entry = bundle.manifest.get("tensorrt")
        if not entry or not entry["plans"]:
            raise EngineError(
                f"{bundle.path} holds no TensorRT plan; compile with --target torch or tensorrt-rtx, or run it with "
                "device cpu"
            )
        trt = trt or _import(bundle.manifest["target"])
        self._limits, self._device = entry["limits"], device
        plan = bundle.path / _choose(entry["plans"], _architecture(device), bundle.path)
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = True  # the plan carries the plugin library
        self.engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise EngineError(f"TensorRT {trt.__version__} cannot load {plan}; it is for another version or GPU")

    def check(self, batch: int, capacity: int, chunk: int) -> None:
        for name, wanted in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
            if wanted > self._limits[name]:
                raise EngineError(
                    f"{name} {wanted} is beyond the {self._limits[name]} that the plan was built for; ask for less, or "
                    f"compile with a larger --max-{name}"
                )

    def chunk(self, batch: int) -> None:
        return None

    def session(self, *sizes: Any) -> Session:
        return Session(self.binding(), *sizes)

    def binding(self) -> PlanBinding:
        return PlanBinding(self.engine, self._device)


def _import(target: str) -> Any:
    from importlib import import_module

    name = "tensorrt_rtx" if target == "tensorrt-rtx" else "tensorrt"
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineError(f"running the plan needs the module {name} ({error}); install it") from error


def _architecture(device: str) -> int | None:
    """Compute capability times ten; None for the stand-in on a CPU."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise EngineError(
            "no NVIDIA GPU that torch can use: a CUDA build of torch and a driver are needed; use device cpu"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _choose(plans: list[dict[str, Any]], architecture: int | None, path: Path) -> str:
    """The plan for that GPU; architecture 0 is the GPU of the machine that built it."""
    for plan in plans:
        if architecture is None or plan["architecture"] in (0, architecture):
            return str(plan["file"])
    built = ", ".join(f"sm_{plan['architecture']}" for plan in plans)
    raise EngineError(
        f"{path} holds plans for {built}, this GPU is sm_{architecture}; compile with --arch {architecture}"
    )
