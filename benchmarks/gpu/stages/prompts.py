"""Prompts of 8k tokens, of the model of Qwen3-8B's shape: read in chunks, at a budget and without eviction."""

import time
from typing import Any

from gpu import model
from gpu.place import Place

TOKENS = 8192


def run(place: Place) -> None:
    engine = model.load(place.built / ("tiny" if place.tiny else "qwen3-8b"), place.device)
    for dense in (False, True):
        place.attempt("prompt", lambda d=dense: prompt(place, engine, d), dense=dense)


def prompt(place: Place, engine: Any, dense: bool) -> dict[str, Any]:
    words = engine.manifest["vocab_size"]
    tokens = [(7 * index) % (words - 10) + 5 for index in range(50 if place.tiny else TOKENS)]
    seconds = []
    for _ in range(1 if place.tiny else 3):  # the first run captures
        start = time.perf_counter()
        engine.generate(tokens, max_new_tokens=1, dense=dense, ignore_position_limit=True)
        seconds.append(time.perf_counter() - start)
    engine._runtime._idle = None
    return {"tokens": len(tokens), "first_s": round(seconds[0], 3), "s": round(seconds[-1], 3)}
