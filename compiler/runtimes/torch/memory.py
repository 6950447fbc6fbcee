"""What a session takes on a device, in bytes, before anything is allocated."""

import math

import torch

from keysieve.compiler.runtimes.torch.program import Program
from keysieve.compiler.weights import free_memory
from keysieve.errors import EngineError
from keysieve.plugins.contract import ROW_STATES

IN_CACHES = ("key_", "value_", *ROW_STATES)  # how the names of what grows with the rows begin
WORKING = 0.05  # of what is held: what a step computes in passing


def check_memory(program: Program, sizes: dict[str, int], device: torch.device) -> None:
    """Raise EngineError, with the arithmetic, where a device has less memory free than a session needs."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    else:
        free = free_memory()
    check(needed(program, sizes), free, sizes["batch"])


def needed(program: Program, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes by kind, for inputs of those sizes."""
    step = sizes | {"tokens": 1, "N": 1}
    held = {one.name: math.prod(one.sized(step)) * one.dtype.itemsize for one in program.inputs}
    caches = sum(size for name, size in held.items() if name.startswith(IN_CACHES))
    plans = sum(size for name, size in held.items() if name.startswith("plan"))
    result = {"keys and values": caches, "plans": plans, "states": sum(held.values()) - caches - plans}
    result["logits"] = sizes["batch"] * sizes["vocabulary"] * 4
    most = max((rows for name, rows in sizes.items() if name.startswith("capacity")), default=0)
    result["scores"] = program.heads * sizes["batch"] * most * 4
    return result


def check(parts: dict[str, int], free: int, batch: int) -> None:
    """Raise EngineError where the parts, with some working memory, are more than `free` bytes."""
    total = int(sum(parts.values()) * (1 + WORKING))
    if total > free:
        listed = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
        raise EngineError(
            f"{batch} sequences need {total / 1e9:.2f} GB there ({listed} GB, and {WORKING:.0%} to work in), and "
            f"{free / 1e9:.2f} GB are free; ask for fewer sequences, or a smaller budget or capacity"
        )
