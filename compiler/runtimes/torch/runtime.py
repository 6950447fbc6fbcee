"""A bundle of the target torch, loaded on a device."""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from keysieve.compiler.bundle import PROGRAM, WEIGHTS, Bundle
from keysieve.compiler.rows import Rows
from keysieve.compiler.runtimes.torch.memory import check_memory
from keysieve.compiler.runtimes.torch.program import Program, read_program
from keysieve.compiler.runtimes.torch.replay import Replay
from keysieve.compiler.runtimes.torch.session import TorchSession
from keysieve.errors import EngineError
from keysieve.kernels.triton.configuration import MAX_CAPACITY

CHUNK = 512  # prompt tokens a step, of all sequences
FEWEST = 16  # of one sequence


def open_runtime(bundle: Bundle, device: str, threads: int | None = None, compiled: bool = False) -> "TorchRuntime":
    """Load a bundle. device: "cuda" or "cpu". threads: of a CPU (None: torch's). compiled: see TorchRuntime.

    Raises EngineError, before anything is loaded, where the device cannot run it.
    """
    place = _device(device)
    if threads is not None:
        if threads < 1:
            raise EngineError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    return TorchRuntime(bundle.path / PROGRAM, load_file(bundle.path / WEIGHTS, device=str(place)), place, compiled)


class TorchRuntime:
    """A Runtime for a program of `export.torch` and its weights, which lie on the device.

    compiled: let torch.compile fuse the decoding step, which takes about a minute when the first session decodes, and
    again for the first of one sequence alone.
    """

    def __init__(self, program: Path, weights: dict[str, Tensor], device: torch.device, compiled: bool = False):
        self._file, self._weights, self._device, self._compiled = program, weights, device, compiled
        if device.type == "cuda":
            _use_kernels()
        self._idle: tuple[Any, TorchSession] | None = None  # the last session, for the next one of its size

    @cached_property
    def _evicting(self) -> tuple[Program, Callable[..., tuple[Tensor, ...]]]:
        return self._read(True)

    @cached_property
    def _dense(self) -> tuple[Program, Callable[..., tuple[Tensor, ...]]]:
        return self._read(False)

    def _read(self, evicts: bool) -> tuple[Program, Callable[..., tuple[Tensor, ...]]]:
        program = read_program(self._file, self._weights, self._device, evicts)
        return program, _fused(program.module) if self._compiled else program.module

    def chunk(self, batch: int) -> int | None:
        """As Runtime's: as many tokens of all sequences as a GPU needs to be busy."""
        return max(FEWEST, CHUNK // batch) if self._device.type == "cuda" else None

    def check(self, batch: int, capacity: int, chunk: int) -> None:
        """Nothing is built for some sizes alone; `session` counts the bytes."""

    def session(
        self,
        manifest: dict[str, Any],
        batch: int,
        capacity: int,
        budget: int | Sequence[int] | None,
        pinned: Sequence[int] | None = None,
        initial: dict[str, np.ndarray] | None = None,
        chunk: int | None = None,
        total: int | None = None,
    ) -> TorchSession:
        """As keysieve.compiler.session.Session. Raises EngineError where the device lacks the memory."""
        rows = Rows(manifest, batch, capacity, budget, chunk, total)
        if self._device.type == "cuda" and not rows.dense and max(rows.capacities, default=0) > MAX_CAPACITY:
            raise EngineError(
                f"the caches would have {max(rows.capacities):,} rows, and the kernels for a GPU choose among "
                f"{MAX_CAPACITY:,} at most; give a smaller budget or capacity"
            )
        sizes = {"batch": batch, "vocabulary": int(manifest["vocab_size"])} | rows.sizes()
        kind = rows.dense, tuple(sizes.items())
        if self._idle is not None and self._idle[0] == kind:
            session = self._idle[1]
        else:
            self._idle = None  # before another takes the memory
            program, decoder = self._dense if rows.dense else self._evicting
            check_memory(program, sizes, self._device)
            layers = manifest["sizes"]["layers"]

            def release(session: TorchSession) -> None:
                self._idle = kind, session

            session = TorchSession(
                program, decoder, Replay(self._device, program.operations), rows, sizes, layers, release
            )
        self._idle = None
        session.reset(rows, pinned, initial or {})
        return session


def _fused(module: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The module as torch.compile makes it, for any batch and capacity."""
    compiled = torch.compile(module, dynamic=True)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Else a batch that is by chance as large as a model's number of heads would be taken for that number.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*inputs)

    return run


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        build = "" if torch.backends.cuda.is_built() else f" (torch {torch.__version__} is a build without CUDA)"
        raise EngineError(
            f"no NVIDIA GPU that torch can use{build}: a CUDA build of torch and a driver are needed; use device cpu"
        )
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


@cache
def _use_kernels() -> None:
    """Put Triton's kernels behind torch.ops.keysieve on a GPU."""
    try:
        import triton
    except ImportError as error:
        raise EngineError(
            f"the kernels for a GPU need Triton, which cannot be imported ({error}); pip install triton"
        ) from error
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        raise EngineError(f"the kernels for a GPU need Triton 3.6 or newer, not {triton.__version__}; update it")
    from keysieve.plugins.torch.cuda import register

    register()
