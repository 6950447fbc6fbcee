"""Triton's interpreter in a process of its own, since Triton chooses between it and a GPU at import."""

import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch


class Interpreter:
    """Calls `launch.<name>(model, **tensors)` in the other process; tensors changed in place come back."""

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_choose_interpreter)
        return self

    def __exit__(self, *_):
        self._pool.shutdown()

    def __call__(self, name, model, **arguments):
        """(what the function returned, the arguments as they are after the call)."""
        return _unpacked(self._pool.submit(_call, name, model, _packed(arguments)).result())


def _choose_interpreter():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _call(name, model, packed):
    from keysieve.kernels.triton import launch

    arguments = _unpacked(packed)
    return _packed((getattr(launch, name)(model, **arguments), arguments))


def _packed(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=True)
