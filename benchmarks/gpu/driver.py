"""A plugin library of keysieve, driven as TensorRT drives it, through driver.cpp."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

DRIVER = "driver.so"
UPDATE, SCORE, SELECT = range(3)  # the library's creators


class Plugin:
    """One plugin of a library. Raises RuntimeError with the library's own words where it refuses."""

    def __init__(self, driver: Path, library: Path, creator: int, **fields: int | str):
        self._driver = ctypes.CDLL(str(driver))
        self._driver.keysieve_make.restype = ctypes.c_void_p
        self._driver.keysieve_workspace.restype = ctypes.c_int64
        self._driver.keysieve_error.restype = ctypes.c_char_p
        text = ";".join(f"{name}={'i' if isinstance(value, int) else 's'}:{value}" for name, value in fields.items())
        self._made = ctypes.c_void_p(self._driver.keysieve_make(str(library).encode(), creator, text.encode()))
        if not self._made:
            raise RuntimeError(f"{library.name} makes no plugin of {text}; the reason is on stderr")

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Enqueue it on torch's stream."""
        self.enqueue(inputs, outputs, torch.cuda.current_stream(inputs[0].device).cuda_stream)

    def enqueue(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int) -> None:
        """Enqueue it on a stream, by its handle."""
        sizes = [size for tensor in inputs for size in tensor.shape]
        described = (
            len(inputs),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_int32 * len(inputs))(*(tensor.dim() for tensor in inputs)),
        )
        device = inputs[0].device
        needed = self._driver.keysieve_workspace(self._made, *described)
        workspace = torch.empty(max(1, needed), dtype=torch.uint8, device=device)
        addresses = [(ctypes.c_void_p * len(group))(*(t.data_ptr() for t in group)) for group in (inputs, outputs)]
        status = self._driver.keysieve_enqueue(
            self._made, *described, *addresses, ctypes.c_void_p(workspace.data_ptr()), ctypes.c_void_p(stream)
        )
        if status:
            raise RuntimeError(self._driver.keysieve_error(self._made).decode())
