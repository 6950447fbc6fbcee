"""Small inputs for each GPU kernel, launched from its PTX and compared with the reference in torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from keysieve.kernels import reference
from keysieve.kernels.reference.select import STD_FLOOR
from keysieve.kernels.triton.aot import Artifact
from keysieve.kernels.triton.configuration import KernelConfiguration, needs_stats
from keysieve.kernels.triton.variants import LIMIT, Grid

from .machine import Array, Device, Report
from .parse import parse


@dataclass
class Case:
    """Inputs of one kernel. `fill` places them on a device: (arguments in order, what to check after the launch)."""

    fill: Callable[[Device], tuple[list[Array | int], Callable[[], None]]]
    batch: int
    capacity: int

    def run(
        self, artifact: Artifact, ptx: str | None = None, seed: int = 0, most: int | None = None, **options: int
    ) -> Report:
        """Launch the artefact, or other PTX in its place, and check. Raises PtxError or AssertionError.

        most: of blocks, in place of the artefact's own number, where it bounds them at all.
        """
        device = Device(seed)
        arguments, check = self.fill(device)
        grid = Grid(artifact.grid_cells, artifact.grid_rows, artifact.grid_most)
        if most is not None and grid.most < LIMIT:
            grid = replace(grid, most=most)
        blocks = grid.of(self.batch, self.capacity)
        report = device.launch(parse(ptx or artifact.ptx), blocks, arguments, artifact.shared, **options)
        check()
        return report


def bits(tensor: Tensor) -> np.ndarray:
    """A tensor as numpy; bfloat16, which numpy does not have, as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def held_rows(length: Tensor, capacity: int) -> np.ndarray:
    """[B, C]: the rows that have been written."""
    return (torch.arange(capacity) < length[:, None]).numpy()


def score_case(model: KernelConfiguration, length: Tensor, limit: Tensor, capacity: int) -> Case:
    """Random keys in the first `length` rows; the other rows are poison."""
    batch, dtype = len(length), getattr(torch, model.dtype)
    leading = (model.layers, batch, model.query_heads)
    keys = [torch.randn(batch, model.kv_heads, capacity, model.head_dim).to(dtype) for _ in range(model.layers)]
    trig = model.policy == "trig"
    centre = torch.randn(*leading, model.offsets, model.head_dim) / 8 if trig else torch.zeros(1, 1, 1, 1, 1)
    weight = torch.randn(*leading, model.rotary_dim // 2) / 8 if trig else torch.zeros(1, 1, 1, 1)
    position = torch.arange(batch) * 1_000_003 + 70_000
    expected = reference.score(
        length, limit, position, centre, weight, [key.double() for key in keys] if trig else keys,
        model.policy, model.query_heads, model.rotary_dim, int(model.interleaved),
    )  # fmt: skip
    written = held_rows(torch.where(length >= limit, length, 0), capacity)[None, :, None, :]

    def fill(device: Device) -> tuple[list[Array | int], Callable[[], None]]:
        held = held_rows(length, capacity)[:, None, :, None]
        caches = [device.array(f"keys of layer {i}", bits(key), held, constant=True) for i, key in enumerate(keys)]
        addresses = np.array([cache.address for cache in caches])
        inputs = {"keys": addresses, "centre": centre, "weight": weight, "length": length, "limit": limit}
        placed = [
            device.array(name, np.asarray(x), constant=True) for name, x in (inputs | {"position": position}).items()
        ]
        scores = device.empty("scores", (*leading, capacity), "f4")

        def check() -> None:
            assert (scores.held == written).all(), "scores: other rows are written than those held"
            error = np.abs(scores.values - expected.numpy())[np.broadcast_to(written, scores.held.shape)]
            assert error.max(initial=0.0) < 1e-4, f"score error {error.max()}"

        return [*placed, scores, batch, capacity], check

    return Case(fill, batch, capacity)


@dataclass
class Selection:
    """Inputs of select with infinities and NaN among the scores; integers [B].

    The first sequence's scores are spread more widely in its later rows, each head's by another factor; those of the
    others are 0 or 1, so that rows near the end tie with the last one that stays.
    """

    model: KernelConfiguration
    length: Tensor
    limit: Tensor
    budget: Tensor
    pinned: Tensor
    capacity: int

    def __post_init__(self) -> None:
        heads = (self.model.layers, len(self.length), self.model.query_heads)
        self.scores = (torch.rand(*heads, self.capacity) < 0.1).float()
        self.scores[:, 0] = torch.randn(heads[0], heads[2], self.capacity)
        self.scores[:, 0, :, self.capacity // 2 :] *= 2 ** torch.arange(1.0, heads[2] + 1)[:, None]
        for first, value in ((5, torch.inf), (7, -torch.inf), (11, torch.nan)):
            self.scores[..., first::37] = value
        self.due = (self.length >= self.limit).numpy()
        self.held = held_rows(torch.where(self.length >= self.limit, self.length, 0), self.capacity)

    def stats(self) -> Tensor:
        """[L, B, Hq, 4] float32: highest score, mean below it, floored std of the usable candidates; and 0."""
        row, length = torch.arange(self.capacity), self.length[:, None]
        front = self.pinned.clamp(min=self.model.sinks)[:, None]
        candidate = (row >= front) & (row < length - self.model.recent)
        usable = candidate[None, :, None] & torch.isfinite(self.scores)
        highest = torch.where(usable, self.scores, -torch.inf).amax(dim=-1, keepdim=True)
        below = torch.where(usable, self.scores - highest, 0)
        count = usable.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = below.sum(dim=-1, keepdim=True) / count
        std = torch.sqrt((torch.where(usable, below - mean, 0) ** 2).sum(dim=-1, keepdim=True) / count)
        return torch.cat([highest, mean, std.clamp(min=STD_FLOOR), torch.zeros_like(std)], dim=-1)

    def place(self, device: Device, *names: str) -> list[Array]:
        """Those inputs as constant arrays; scores are poison where not due or not held."""
        held = {"scores": self.held[None, :, None, :]}
        return [device.array(name, bits(getattr(self, name)), held.get(name), constant=True) for name in names]


def stats_case(inputs: Selection) -> Case:
    expected = inputs.stats().numpy()[..., :3]

    def fill(device: Device) -> tuple[list[Array | int], Callable[[], None]]:
        placed = inputs.place(device, "scores", "length", "limit", "pinned")
        stats = device.empty("stats", (*expected.shape[:3], 4), "f4")

        def check() -> None:
            due = np.broadcast_to(inputs.due[None, :, None, None], expected.shape)
            assert (stats.held[..., :3] == due).all(), "stats: written for other sequences than those due"
            assert np.allclose(stats.values[..., :3][due], expected[due], rtol=1e-5, atol=1e-6), "wrong statistics"

        return [*placed, stats, len(inputs.length), inputs.capacity], check

    return Case(fill, len(inputs.length), inputs.capacity)


def plan_case(inputs: Selection, gated: bool = False) -> Case:
    """gated: with utilities, for a kernel that was built to add them."""
    model, capacity = inputs.model, inputs.capacity
    more = 2 * torch.randn(model.layers, len(inputs.length), model.kv_heads, capacity) if gated else None
    expected = reference.select(
        inputs.scores, inputs.length, inputs.limit, inputs.budget, inputs.pinned,
        model.scope, model.kv_heads, model.sinks, model.recent, more,
    )  # fmt: skip

    def fill(device: Device) -> tuple[list[Array | int], Callable[[], None]]:
        scores, *placed = inputs.place(device, "scores", "length", "limit", "budget", "pinned")
        known = inputs.due[None, :, None, None] & needs_stats(model.scope)
        stats = device.array("stats", inputs.stats().numpy(), known, constant=True)
        shape = tuple(expected[0].shape)
        utility = scores
        if more is not None:
            utility = device.array("utility", more.numpy(), inputs.held[None, :, None, :], constant=True)
        ranks, plan = device.empty("ranks", shape, "u4"), device.empty("plan", shape, "i4")
        keep, evicted = device.empty("keep", shape[1:2], "i4"), device.empty("evicted", shape[1:2], "i4")

        def check() -> None:
            due = np.broadcast_to(inputs.due[None, :, None, None], shape)
            assert (plan.held == due).all(), "plan: other parts are written than those of sequences that are due"
            assert keep.held.all(), "keep is not written"
            assert evicted.held.all(), "evicted is not written"
            for got, want in zip((plan, keep, evicted), expected, strict=True):
                right = (got.values == want.numpy()) | (got is plan) & ~got.held
                assert right.all(), f"{got.name} differs in {(~right).sum()} places"

        return [scores, stats, *placed, utility, ranks, plan, keep, evicted, len(inputs.length), inputs.capacity], check

    return Case(fill, len(inputs.length), inputs.capacity)


def update_case(
    model: KernelConfiguration, length: Tensor, keep: Tensor, capacity: int, tokens: int, layer: int = 0
) -> Case:
    """A random plan of `keep` of the `length` rows (-1: not due), then `tokens` new rows.

    Where rows are single numbers, the case is of update_numbers. Else the new keys lie in memory as [B,S,Hkv,D], as a
    projection leaves them; the new values as [B,Hkv,S,Dv].
    """
    batch, dtype = len(length), getattr(torch, model.dtype)
    plan = torch.zeros(model.plan_layers, batch, model.plan_heads, capacity, dtype=torch.int32)
    for cell in np.ndindex(plan.shape[:3]):
        kept, rows = max(int(keep[cell[1]]), 0), int(length[cell[1]])
        stay = kept // 8  # the first rows stay where they are
        moved = stay + torch.randperm(rows - stay)[: kept - stay].sort().values
        plan[cell][:kept] = torch.cat([torch.arange(stay), moved])
    widths = {"key": model.head_dim, "value": model.value_dim}
    new = {name: torch.randn(batch, model.kv_heads, tokens, width).to(dtype) for name, width in widths.items()}
    old = {name: torch.randn(batch, model.kv_heads, capacity, width).to(dtype) for name, width in widths.items()}
    expected = reference.update(*new.values(), length, plan, keep, *old.values(), layer)
    if set(widths.values()) == {1}:
        stored, strides = new, []
    else:
        stored = {"key": new["key"].transpose(1, 2).contiguous(), "value": new["value"]}
        strides = [*stored["key"].transpose(1, 2).stride()[:3], *stored["value"].stride()[:3]]
    end = torch.where(keep >= 0, keep, length) + tokens

    def fill(device: Device) -> tuple[list[Array | int], Callable[[], None]]:
        placed = [device.array(f"new {name}", bits(x), constant=True) for name, x in stored.items()]
        placed.append(device.array("length", length.numpy(), constant=True))
        planned = held_rows(keep.clamp(min=0), capacity)[None, :, None, :]
        placed.append(device.array("plan", plan.numpy(), planned, constant=True))
        placed.append(device.array("keep", keep.numpy(), constant=True))
        held = held_rows(length, capacity)[:, None, :, None]
        caches = [device.array(name, bits(x), held) for name, x in old.items()]

        def check() -> None:
            valid = held_rows(end, capacity)[:, None, :, None]
            for cache, want, (name, before) in zip(caches, expected, old.items(), strict=True):
                assert ((cache.values == bits(want)) | ~valid).all(), f"{name}: wrong rows"
                # Rows past the end are stale, not changed.
                assert ((cache.values == bits(before)) | valid).all(), f"{name}: rows past the end are changed"

        return [*placed, *caches, batch, capacity, tokens, model.plan_layers, layer, *strides], check

    return Case(fill, batch, capacity)
