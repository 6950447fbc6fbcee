"""A whole model of Qwen3-8B's shape: tokens per second at a budget, and of the same engine that holds every row."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu import model
from gpu.place import Place
from gpu.sizes import QWEN3_8B, TINY
from keysieve.compiler.engine import Engine
from keysieve.compiler.runtimes.torch.session import TorchSession
from keysieve.compiler.sampling import Sampling
from keysieve.errors import EngineError

ROOM = 512  # rows beyond the history of a dense engine
BANDWIDTH = 3.35e12  # bytes a second, of the data sheet: for bounds
LONG = 32768  # tokens of history for the largest batch
CASES = ((8, None), (8, 8192), (8, 32768), (32, None), (32, 8192), (1, None), (1, 8192), (1, 32768))


def run(place: Place, compiled: bool = False, turn: str | None = None) -> None:
    """Cases (batch, rows that a dense engine holds; None: the budget). turn: compile, then wait for that file."""
    shape, cases = (TINY, ((2, None), (2, 60))) if place.tiny else (QWEN3_8B, CASES)
    engine = model.load(place.built / ("tiny" if place.tiny else "qwen3-8b"), place.device, compiled)
    kind = "compiled" if compiled else "plain"
    if turn:
        for history in (None, 60):
            with filled_session(place, engine, 2, history) as session:
                decode(session, 2, 3)
        while not Path(turn).exists():
            time.sleep(0.05)
    for batch, history in cases:
        if compiled and batch == 1 and not place.tiny:
            continue  # torch.compile takes one sequence for another program
        about = {"engine": kind, "batch": batch, "budget": None if history else shape.budget, "history": history}
        place.attempt("decoding", lambda b=batch, h=history: decoding(place, engine, b, h), **about)
    if not compiled:
        for dense in (False, True):
            place.attempt("largest batch", lambda d=dense: largest_batch(place, engine, d), dense=dense)


def decoding(place: Place, engine: Engine, batch: int, history: int | None) -> dict[str, Any]:
    shape = TINY if place.tiny else QWEN3_8B
    interval = shape.rows - shape.budget
    started = time.perf_counter()
    with filled_session(place, engine, batch, history) as session:
        first = time.perf_counter()
        seconds = decode(session, batch, 2 * interval + 2)[2:]  # the first ones compile, warm up and capture
        per_token = statistics.mean(seconds[-interval:])
        result = {
            "ms": round(1e3 * per_token, 3),
            "tokens_per_s": round(batch / per_token, 1),
            "start_s": round(first - started, 1),
            "first_steps_s": round(time.perf_counter() - first - sum(seconds), 1),
            "rounds": sum(session.counters.rounds),
        }
        weights = sum(tensor.nbytes for tensor in engine._runtime._weights.values())
        weights -= engine._runtime._weights["model.model.embed_tokens.weight"].nbytes  # a few rows of it are read
        rows = (history or shape.budget + interval / 2) * shape.row_bytes() * batch
        result["bound_ms"] = round(1e3 * (weights + rows) / BANDWIDTH, 3)
        if not place.tiny:
            result["graph"] = graph_times(session, history is None)
            result["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return result


@contextlib.contextmanager
def filled_session(place: Place, engine: Engine, batch: int, history: int | None) -> Iterator[TorchSession]:
    """A session that holds as many rows of noise, as after a text of that length; its memory is free afterwards."""
    shape = TINY if place.tiny else QWEN3_8B
    wanted: dict[str, Any] = {"capacity": history + ROOM, "dense": True} if history else {}
    session = engine.session(batch, **wanted)
    rows = history or shape.budget
    for name, tensor in session._held.items():
        if name.startswith(("key_", "value_")):
            tensor.normal_()
    session._held["length"].fill_(rows)
    session._held["position"].fill_(history or 4 * shape.budget)
    session._rows.held[:] = rows
    try:
        yield session
    finally:
        engine._runtime._idle = None
        session.__dict__.clear()
        if not place.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def decode(session: TorchSession, batch: int, tokens: int) -> list[float]:
    """Seconds of every token, as the host sees them."""
    steps = session.decode([[5]] * batch, 1, Sampling(), set(), tokens)
    next(steps)
    going, times = [True] * batch, []
    for _ in range(tokens - 1):
        start = time.perf_counter()
        steps.send(going)
        times.append(time.perf_counter() - start)
    return times


def graph_times(session: TorchSession, evicts: bool) -> dict[str, Any]:
    """Milliseconds of replays of the captured step, without the host; and its kernels."""
    from torch.profiler import ProfilerActivity, profile

    (graph, _) = next(entry for kind, entry in session._replay._graphs.items() if not isinstance(kind, tuple))
    times = []
    for _ in range(140 if evicts else 40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        graph.replay()
        torch.cuda.synchronize()
    kernels = sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)
    listed = [[event.key[:60], event.count, round(event.device_time_total, 1)] for event in kernels[:14]]
    return {
        "median_ms": round(statistics.median(times), 3),
        "worst_ms": round(max(times), 3),
        "kernels": sum(event.count for event in kernels),
        "kernels_us": listed,
    }


def largest_batch(place: Place, engine: Engine, dense: bool) -> dict[str, Any]:
    """The most sequences with LONG tokens of history that fit, by the engine's own arithmetic; and that they run."""
    history = (60 if place.tiny else LONG) if dense else None
    fits, step = (2, 0) if place.tiny else (0, 512)
    while step:
        try:
            check(place, engine, fits + step, history)
        except EngineError:
            step //= 2
        else:
            fits += step
    with filled_session(place, engine, fits, history) as session:
        seconds = decode(session, fits, 6 if place.tiny else 12)
        return {
            "sequences": fits,
            "ms": round(1e3 * statistics.median(seconds[4:]), 1),
            "kv_GB": round(session.kv_bytes / 1e9, 2),
        }


def check(place: Place, engine: Engine, batch: int, history: int | None) -> None:
    """Raise EngineError where that many sequences do not fit."""
    from keysieve.compiler.runtimes.torch.memory import check_memory

    program = engine._runtime._dense[0] if history else engine._runtime._evicting[0]
    capacity = history + ROOM if history else QWEN3_8B.rows
    sizes = {"batch": batch, "capacity": capacity, "vocabulary": engine.manifest["vocab_size"]}
    check_memory(program, sizes, place.device)
