"""An eviction round, against a copy of the bytes that it must move; and its kernels where nothing is due."""

import torch

from gpu.libraries import kernels_of
from gpu.place import Place
from gpu.sizes import BATCHES, QWEN3_8B, TINY, Shape
from gpu.tensors import random_inputs
from keysieve.kernels.triton import launch
from keysieve.kernels.triton.traffic import Round, minimum

IDLE_STEPS = 20  # idle pairs in one graph, so that launching the graph itself does not count


def run(place: Place) -> None:
    for batch in (1, 2) if place.tiny else BATCHES:
        place.attempt(
            "round", lambda batch=batch: round_of(place, TINY if place.tiny else QWEN3_8B, batch), batch=batch
        )


def round_of(place: Place, shape: Shape, batch: int) -> dict[str, object]:
    given = random_inputs(shape, batch, place.device)
    addresses = torch.tensor([key.data_ptr() for key in given.keys], device=place.device)
    constants = "trig", shape.query_heads, shape.head_dim, 0
    chosen = "per_layer_per_head", shape.kv_heads, shape.sinks, shape.recent
    never = torch.full_like(given.limit, shape.capacity + 1)
    plan, keep, evicted = launch.select(*given.select(launch.score_at(*given.score(), addresses, *constants)), *chosen)
    out = plan, keep, evicted
    none = torch.full_like(keep, -1)

    def score(limit: torch.Tensor | None = None) -> torch.Tensor:
        return launch.score_at(*given.score(limit), addresses, *constants)

    scores = score()

    def select(limit: torch.Tensor | None = None) -> None:
        launch.select_(*given.select(scores, limit), *out, *chosen)

    def update(keep: torch.Tensor) -> None:
        for layer, (key, value) in enumerate(zip(given.keys, given.values, strict=True)):
            launch.update_(given.key_new, given.value_new, given.length, plan, keep, key, value, layer)

    def idle() -> None:
        for _ in range(IDLE_STEPS):
            score(never)
            select(never)

    def whole() -> None:
        score()
        select()
        update(keep)

    kernels = kernels_of(shape, sinks=shape.sinks, recent=shape.recent)
    moved = int((plan[..., : shape.budget] != torch.arange(shape.budget, device=plan.device)).sum())
    moved //= shape.layers * batch * shape.kv_heads
    least = minimum(kernels, Round(shape.rows, shape.budget, moved, shape.capacity, batch))
    measured = {
        "score": place.microseconds(score),
        "select": place.microseconds(select),
        "updates": place.microseconds(lambda: update(keep)),
        "round": place.microseconds(whole),
        "appends": place.microseconds(lambda: update(none)),
        "idle score and select": place.microseconds(idle) / IDLE_STEPS,
        "copy of the least bytes": place.copying(least),
    }
    return {
        "us": {name: round(time, 1) for name, time in measured.items()},
        "least_MB": round(least / 1e6, 1),
        "of_copy": round(measured["round"] / measured["copy of the least bytes"], 2),
    }
