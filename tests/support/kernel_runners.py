"""The kernels in Triton's interpreter, in a process of its own since Triton chooses it at import, and on a GPU."""

import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch


class Interpreter:
    """Calls `launch.<name>(**arguments)` in the other process; tensors changed in place come back."""

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_choose_interpreter)
        return self

    def __exit__(self, *_):
        self._pool.shutdown()

    def __call__(self, name, **arguments):
        """(what the function returned, the arguments as they are after the call)."""
        return _unpacked(self._pool.submit(_call, name, _packed(arguments)).result())


def _choose_interpreter():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from keysieve.kernels.triton.variants import PROGRAMS

    PROGRAMS.update(dict.fromkeys(PROGRAMS, 3))  # so few that a program gets several parts
    _multiply_bfloat16()


def _multiply_bfloat16():
    """Triton's interpreter keeps bfloat16 as integers, and `dot` would multiply those."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def with_bfloat16(self, *arguments):
        wide = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in arguments[:2])
        return create_dot(self, *wide, *arguments[2:])

    InterpreterBuilder.create_dot = with_bfloat16


def _call(name, packed):
    from keysieve.kernels.triton import launch

    arguments = _unpacked(packed)
    return _packed((getattr(launch, name)(**arguments), arguments))


def _packed(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def on_gpu(name, **arguments):
    """What the interpreter's call returns, from the GPU of this machine."""
    from keysieve.kernels.triton import launch

    there = _moved(arguments, "cuda")
    result = getattr(launch, name)(**there)
    torch.cuda.synchronize()
    return _moved((result, there), "cpu")


def _moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if isinstance(value, list | tuple) else value
