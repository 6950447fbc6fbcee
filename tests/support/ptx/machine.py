"""Runs the blocks (CTAs) of a kernel on the CPU: many blocks at once, one warp of each at a time, in random order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from .memory import Actors, Memory, Traffic
from .parse import JUMPS, Instruction, Kernel, PtxError
from .translate import SHARED_BASE, Step, translate

WARP = 32
GLOBAL_BASE = 1 << 40
_GRANULE = 2  # bytes of global memory that share a shadow entry
_GAP = 4096  # bytes between two arrays that belong to neither
_TOGETHER = 64  # blocks whose instructions run as one numpy operation


@dataclass
class Array:
    """An array in global memory. `held` says which elements have been written: reading the others is an error."""

    name: str
    values: np.ndarray
    held: np.ndarray
    constant: bool
    address: int


@dataclass
class Report:
    """What a launch did."""

    steps: int = 0  # basic blocks executed, which bounds a launch that would not end
    barriers: int = 0  # times that a barrier let warps go on
    executed: set[int] = field(default_factory=set)  # basic blocks that ran
    traffic: Traffic = field(default_factory=Traffic)  # of global memory, if it was asked for


class Device:
    """Global memory and the launches on it. The order of blocks and warps follows from the seed."""

    def __init__(self, seed: int = 0) -> None:
        self.arrays: list[Array] = []
        self._random = np.random.default_rng(seed)
        self._end = 0

    def array(self, name: str, values: np.ndarray, held: np.ndarray | None = None, constant: bool = False) -> Array:
        """Place a copy of an array; `held` (broadcast to it) marks what may be read, constant what is never written."""
        values = np.array(values, order="C")
        held = np.broadcast_to(True if held is None else held, values.shape).copy()
        self.arrays.append(Array(name, values, held, constant, GLOBAL_BASE + self._end))
        self._end += -(-values.nbytes // 256) * 256 + _GAP
        return self.arrays[-1]

    def empty(self, name: str, shape: Sequence[int], dtype: str) -> Array:
        """Place an array that nothing has been written to yet."""
        return self.array(name, np.zeros(shape, dtype), held=np.array(False))

    def launch(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        arguments: Sequence[Array | int],
        shared: int = 0,
        count: bool = False,
        max_steps: int = 1_000_000,
        turns: int = WARP,
    ) -> Report:
        """Run a kernel with `shared` bytes of shared memory in each block; parameters not given are null pointers.

        Between two barriers a block's warps run in `turns` groups, drawn at random: by default one after the other.
        With fewer turns a launch is faster, and just as sure to find a race, since that does not need luck.

        Raises PtxError, with the line, for what a GPU might not forgive: see `Memory` and `_Blocks`.
        """
        memory, report = self._memory(count), Report()
        numbers = [item.address if isinstance(item, Array) else item for item in arguments]
        numbers += [0] * (len(kernel.parameters) - len(numbers))
        parameters = np.array([n & 2**64 - 1 for n in numbers], np.uint64)
        steps = [[(line, i, _step(kernel, line, i)) for line, i in block] for block in kernel.blocks]
        grid = (*grid, *(1,) * (3 - len(grid)))
        launch = _Launch(kernel, steps, grid, np.array(list(product(*map(range, grid)))), parameters, shared, turns)
        order = self._random.permutation(len(launch.indices))
        with np.errstate(all="ignore"):
            for first in range(0, len(order), _TOGETHER):
                _Blocks(launch, order[first : first + _TOGETHER], self._random, memory, report).run(max_steps)
        report.traffic = memory.traffic()
        for item in self.arrays:
            start = item.address - GLOBAL_BASE
            item.values = (
                memory.data[start : start + item.values.nbytes].view(item.values.dtype).reshape(item.values.shape)
            )
            held = memory.held(start, item.values.nbytes)
            item.held = held.reshape(*item.values.shape, -1).all(axis=-1)
        return report

    def _memory(self, counts: bool) -> Memory:
        memory = Memory(self._end, _GRANULE, "global", counts)
        for item in self.arrays:
            start = item.address - GLOBAL_BASE
            memory.data[start : start + item.values.nbytes] = item.values.reshape(-1).view(np.uint8)
            memory.mark(start, item.held.reshape(-1).repeat(item.values.itemsize // _GRANULE), item.constant)
            memory.regions.append((start, start + item.values.nbytes, item.name))
        return memory


def _step(kernel: Kernel, line: int, instruction: Instruction) -> Step | None:
    if instruction.opcode[0] in JUMPS:
        return None
    try:
        return translate(instruction.text, tuple(kernel.registers.items()))
    except PtxError as error:
        raise PtxError(f"{kernel.name} line {line}: {instruction.text}\n  {error}") from error


@dataclass
class _Launch:
    """What the blocks of a launch have in common."""

    kernel: Kernel
    steps: list[list[tuple[int, Instruction, Step | None]]]  # of each basic block; no step: a jump
    grid: tuple[int, ...]
    indices: np.ndarray  # [blocks, 3]
    parameters: np.ndarray  # uint64; 8 bytes of parameter space each
    shared: int
    turns: int


class _Blocks:
    """Some blocks of a launch in step: a slot, which holds some warps of each, runs until all wait or are done.

    The slots of a block hold its warps in random order, and take turns in random order. Lanes at the lowest basic
    block go first, so that branches that diverged meet again.
    """

    def __init__(
        self, launch: "_Launch", blocks: np.ndarray, random: np.random.Generator, memory: Memory, report: Report
    ) -> None:
        kernel, indices = launch.kernel, launch.indices[blocks]
        self.launch, self.random, self.memory, self.report = launch, random, memory, report
        warps = kernel.threads // WARP
        self.slots = math.gcd(warps, launch.turns)
        self.stride = -(-launch.shared // 256) * 256
        self.shared = Memory(len(blocks) * self.stride, kernel.shared_granule, "shared")
        empty = np.zeros(launch.shared // kernel.shared_granule, bool)
        for index in range(len(blocks)):
            self.shared.mark(index * self.stride, empty, constant=False)

        # Slot s: warps/slots warps of block 0, then as many of block 1, and so on, 32 lanes each.
        each = warps // self.slots
        order = random.permuted(np.tile(np.arange(warps), (len(blocks), 1)), axis=1)
        order = order.reshape(len(blocks), self.slots, each).swapaxes(0, 1)
        self.warp = order.reshape(self.slots, -1).repeat(WARP, axis=1)
        self.lanes = self.warp.shape[1]
        self.place = np.arange(len(blocks)).repeat(each * WARP)
        self.block, lane = blocks[self.place], np.arange(self.lanes) % WARP
        self.at = np.zeros((self.slots, self.lanes), np.int32)  # the basic block a lane runs next
        self.waits = np.full((self.slots, self.lanes), -1, np.int32)  # the line of the barrier a lane waits at
        self.slot, self.epoch = 0, 0
        self.registers: list[dict[str, np.ndarray]] = [{} for _ in range(self.slots)]
        common = {f"%ctaid.{axis}": indices[self.place, i] for i, axis in enumerate("xyz")}
        common |= {f"%nctaid.{axis}": np.full(self.lanes, n) for axis, n in zip("xyz", launch.grid, strict=True)}
        common |= {f"%tid.{axis}": np.zeros(self.lanes, np.int64) for axis in "yz"}
        common |= {"%ntid.x": np.full(self.lanes, kernel.threads), "%laneid": lane}
        self.specials = [common | {"%tid.x": warp * WARP + lane} for warp in self.warp]

    def run(self, max_steps: int) -> None:
        """Run all warps to their end."""
        while True:
            for slot in self.random.permutation(self.slots):
                self.slot = slot
                self._run_slot(max_steps)
            if (self.waits < 0).all():
                return
            self._pass_barrier()

    def _run_slot(self, max_steps: int) -> None:
        registers, specials, end = self.registers[self.slot], self.specials[self.slot], len(self.launch.steps)
        at, waits = self.at[self.slot], self.waits[self.slot]
        while (live := (at < end) & (waits < 0)).any():
            current = at[live].min()
            active = live & (at == current)
            mask = None if active.all() else active
            changes = None if mask is None or (active | (at == end)).all() else active
            at[active] = current + 1
            self.report.steps += 1
            if self.report.steps > max_steps:
                raise PtxError(f"{self.launch.kernel.name} runs on after {max_steps} steps: an endless loop?")
            for line, instruction, step in self.launch.steps[current]:
                try:
                    if step is None:
                        self._jump(line, instruction, active)
                    else:
                        step(registers, changes, mask, specials, self)
                except (PtxError, KeyError) as error:
                    reason = f"register {error} has no value" if isinstance(error, KeyError) else error
                    raise PtxError(f"{self.launch.kernel.name} line {line}: {instruction.text}\n  {reason}") from error
            self.report.executed.add(int(current))

    def _jump(self, line: int, instruction: Instruction, active: np.ndarray) -> None:
        """The end of a basic block: bra, ret, exit or bar.sync."""
        name, *kind = instruction.opcode
        if instruction.guard:
            guard = self.registers[self.slot][instruction.guard]
            active = active & (~guard if instruction.negated else guard)
        if name == "bra" and kind in ([], ["uni"]):
            self.at[self.slot][active] = self.launch.kernel.labels[str(instruction.operands[0])]
        elif name in ("ret", "exit"):
            self.at[self.slot][active] = len(self.launch.steps)
        elif kind == ["sync"] and instruction.operands == ("0",):
            self.converged(active, np.uint32(0xFFFFFFFF))
            self.waits[self.slot][active] = line
        else:
            raise PtxError("the interpreter does not know this jump or barrier")

    def _pass_barrier(self) -> None:
        """Let the blocks go on whose warps all wait at one and the same barrier; others are stuck."""
        waits = self.waits.reshape(self.slots, self.place[-1] + 1, -1)
        stuck = (waits != waits[:1, :, :1]).any(axis=(0, 2))
        if stuck.any():
            lines = sorted(set(waits[:, stuck.argmax()].ravel().tolist()))
            where = ", ".join("done" if line < 0 else f"at the barrier of line {line}" for line in lines)
            raise PtxError(f"{self.launch.kernel.name}: deadlock, the warps of one block are {where}")
        self.waits[:] = -1
        self.epoch += 1
        self.report.barriers += 1

    def converged(self, mask: np.ndarray | None, members: np.ndarray) -> None:
        """An operation across a warp needs all lanes that it names, which is all of them in Triton's code."""
        named = members if mask is None or np.ndim(members) == 0 else members[mask]
        split = mask is not None and (mask.reshape(-1, WARP) != mask.reshape(-1, WARP)[:, :1]).any()
        if split or (named != 0xFFFFFFFF).any():
            raise PtxError("some lanes of a warp do not take part in an operation of the whole warp")

    def parameter(self, address: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """The parameter that starts at that byte of parameter space, where each takes 8."""
        index = np.broadcast_to(address, self.lanes) // 8
        index = index if mask is None else np.where(mask, index, 0)
        if ((index < 0) | (index >= len(self.launch.parameters))).any():
            raise PtxError("out of bounds: there is no such parameter")
        return self.launch.parameters[index]

    def load(self, space: str, address: np.ndarray, size: int, count: int, mask: np.ndarray | None) -> np.ndarray:
        """Values [count, lanes] of `size` bytes, unsigned; 0 in lanes outside the mask."""
        lanes, memory, start = self._place(space, address, size * count, mask)
        values = memory.load(start, size, count, self._actors(lanes))
        if mask is None:
            return values
        full = np.zeros((count, self.lanes), values.dtype)
        full[:, lanes] = values
        return full

    def prefetch(self, address: np.ndarray, mask: np.ndarray | None) -> None:
        """What a kernel asks for ahead must be there to be read, or it would be asked for in vain."""
        lanes, memory, start = self._place("global", address, 1, mask)
        memory.check_held(start, self._actors(lanes))

    def store(
        self, space: str, address: np.ndarray, size: int, values: tuple[np.ndarray, ...], mask: np.ndarray | None
    ) -> None:
        lanes, memory, start = self._place(space, address, size * len(values), mask)
        full = np.stack([np.broadcast_to(value, self.lanes)[lanes] for value in values])
        memory.store(start, size, full, self._actors(lanes))

    def _place(
        self, space: str, address: np.ndarray, length: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, Memory, np.ndarray]:
        """(lanes that access, the memory, byte of it for each)."""
        lanes = np.arange(self.lanes) if mask is None else np.flatnonzero(mask)
        address = np.full(len(lanes), address) if np.ndim(address) == 0 else address[lanes]
        if space == "global":
            return lanes, self.memory, address - GLOBAL_BASE
        offset = address - SHARED_BASE
        if ((offset < 0) | (offset > self.launch.shared - length)).any():
            raise PtxError(f"out of bounds: shared addresses {offset.min()} to {offset.max()} of {self.launch.shared}")
        return lanes, self.shared, self.place[lanes] * self.stride + offset

    def _actors(self, lanes: np.ndarray) -> Actors:
        return Actors(self.block[lanes], self.warp[self.slot][lanes], self.epoch)
