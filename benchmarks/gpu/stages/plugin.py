"""The TensorRT plugin library without TensorRT: createPlugin and enqueue of its three nodes, beside the reference."""

from pathlib import Path

import torch

from gpu.driver import DRIVER, SCORE, SELECT, UPDATE, Plugin
from gpu.libraries import CASES, Case
from gpu.place import Place
from gpu.tensors import random_inputs
from keysieve.kernels import reference


def run(place: Place, only: str | None = None) -> None:
    """only: one case, whose results are not recorded: for tools that watch what it does."""
    if only:
        for library in sorted(place.built.glob(f"{only}-*.so")):
            print(check(place, CASES[only], library), flush=True)
        return
    for name, case in CASES.items():
        for library in sorted(place.built.glob(f"{name}-*.so")):
            place.attempt("plugin", lambda c=case, p=library: check(place, c, p), library=library.name)


def check(place: Place, case: Case, library: Path) -> dict[str, object]:
    """score -> select -> update of every layer; the plan and the caches must be the reference's, byte for byte."""
    shape, model = case.shape, case.kernels
    given = random_inputs(shape, case.batch, place.device, model.rotary_dim, model.offsets, model.value_dim)
    constants = {
        "policy": model.policy,
        "query_heads": model.query_heads,
        "rotary_dim": model.rotary_dim,
        "interleaved": int(model.interleaved),
    }
    chosen = {"scope": model.scope, "kv_heads": model.kv_heads, "sinks": model.sinks, "recent": model.recent}
    driver = place.built / DRIVER
    length, limit, position, centre, weight, keys = given.score()
    scores = torch.full(
        (shape.layers, case.batch, shape.query_heads, shape.capacity), float("nan"), device=place.device
    )
    Plugin(driver, library, SCORE, **constants)([length, limit, position, centre, weight, *keys], [scores])
    wanted = reference.score(length, limit, position, centre, weight, [key.double() for key in keys], **constants)
    held = slice(0, shape.rows)
    score_error = float((scores[..., held] - wanted[..., held]).norm() / wanted[..., held].norm())

    plan = torch.full(
        (model.plan_layers, case.batch, model.plan_heads, shape.capacity), -7, dtype=torch.int32, device=place.device
    )
    keep, evicted = (torch.full((case.batch,), -7, dtype=torch.int32, device=place.device) for _ in range(2))
    Plugin(driver, library, SELECT, **chosen)(list(given.select(scores)), [plan, keep, evicted])
    planned = reference.select(*given.select(scores), **chosen)
    plans_equal = torch.equal(plan[..., : shape.budget], planned[0][..., : shape.budget])
    plans_equal &= torch.equal(keep, planned[1]) and torch.equal(evicted, planned[2])

    caches_equal, rows = True, shape.budget + 1
    for layer, (key, value) in enumerate(zip(given.keys, given.values, strict=True)):
        update = Plugin(driver, library, UPDATE, layer=layer)
        new = given.key_new, given.value_new, length, plan, keep
        expected = reference.update(*new, key.clone(), value.clone(), layer=layer)
        update([*new, key, value], [key, value])
        caches_equal &= all(
            torch.equal(found[:, :, :rows], right[:, :, :rows])
            for found, right in zip((key, value), expected, strict=True)
        )
    return {"score_error": score_error, "plans_equal": plans_equal, "caches_equal": caches_equal}
