"""Byte-addressed memory that knows what is allocated, written, and by whom since the last barrier."""

from dataclasses import dataclass, field

import numpy as np

from .parse import PtxError

NOBODY, MANY = -1, -2
_SECTOR = 32
_FREE, _POISON, _HELD, _CONSTANT = range(4)
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Traffic:
    """Bytes of the 32-byte sectors that each block of a launch touched, by array: what a cache per block leaves."""

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


@dataclass
class Actors:
    """Who accesses, lane by lane: its block and its warp in the block; and the barriers passed so far."""

    block: np.ndarray
    warp: np.ndarray
    epoch: int

    def at(self, lanes: np.ndarray) -> "Actors":
        return Actors(self.block[lanes], self.warp[lanes], self.epoch)


@dataclass
class Memory:
    """A flat address space. `granule` bytes share one entry of the shadow: the smallest access it allows.

    The shadow holds a state per granule, and for the race check the last writer and the latest readers: two
    accesses, one of them a write, are a race unless one warp does both or a barrier of their block parts them.
    """

    size: int
    granule: int
    name: str
    counts: bool = False
    regions: list[tuple[int, int, str]] = field(default_factory=list)  # (start, end, name), for messages and traffic

    def __post_init__(self) -> None:
        self.data = np.zeros(self.size, np.uint8)
        self.state = np.zeros(self.size // self.granule, np.uint8)
        self.touched: dict[str, list[np.ndarray]] = {"read": [], "written": []}
        entries = self.size // self.granule
        self.writer = [np.full(entries, NOBODY, np.int32) for _ in range(3)]  # block, warp, epoch
        self.reader = [np.full(entries, NOBODY, np.int32) for _ in range(3)]

    def mark(self, start: int, held: np.ndarray, constant: bool) -> None:
        """Allocate len(held) granules from byte `start`: those held may be read, the others are poison."""
        first = start // self.granule
        self.state[first : first + len(held)] = np.where(held, _CONSTANT if constant else _HELD, _POISON)

    def held(self, start: int, length: int) -> np.ndarray:
        """Which granules of `length` bytes from byte `start` may be read."""
        return self.state[start // self.granule : (start + length) // self.granule] >= _HELD

    def load(self, start: np.ndarray, size: int, count: int, who: Actors) -> np.ndarray:
        """Lanes read `count` values of `size` bytes from byte start [n]: [count, n] unsigned."""
        entries = self._entries(start, size * count, who)
        if (self._held_state(entries, who) != _CONSTANT).any():
            self._read_is_ordered(entries, who)
        if self.counts:
            self._count(start, size * count, who, "read")
        return self.data.view(_UINT[size])[start // size + np.arange(count)[:, None]]

    def check_held(self, start: np.ndarray, who: Actors) -> None:
        """Raise PtxError unless the bytes at `start` [n] may be read; they are not."""
        self._held_state(self._entries(start // self.granule * self.granule, self.granule, who), who)

    def _held_state(self, entries: np.ndarray, who: Actors) -> np.ndarray:
        state = self.state[entries]
        if (state == _POISON).any():
            raise PtxError(f"reads {self._where(entries, state == _POISON, who)}, which nobody has written")
        return state

    def store(self, start: np.ndarray, size: int, values: np.ndarray, who: Actors) -> None:
        """Lanes write values [count, n] of `size` bytes to byte start [n]."""
        entries = self._entries(start, size * len(values), who)
        state = self.state[entries]
        if (state == _CONSTANT).any():
            raise PtxError(f"writes {self._where(entries, state == _CONSTANT, who)}, which is an input")
        self._write_is_ordered(entries, who)
        self.state[entries] = _HELD
        if self.counts:
            self._count(start, size * len(values), who, "written")
        data, index = self.data.view(_UINT[size]), start // size + np.arange(len(values))[:, None]
        data[index] = values
        if (data[index] != values).any():
            raise PtxError(f"race: lanes of one warp write different values to {self._where(entries, None, who)}")

    def _entries(self, start: np.ndarray, bytes_each: int, who: Actors) -> np.ndarray:
        """Shadow entries [granules, n] of an access; checks alignment and bounds."""
        if bytes_each % self.granule:
            raise PtxError(f"an access of {bytes_each} bytes to {self.name} memory tracked by {self.granule}")
        if (start % bytes_each).any():
            raise PtxError(
                f"{self.name} address {int(start[start % bytes_each > 0][0]):#x} is not {bytes_each}-byte aligned"
            )
        outside = (start < 0) | (start > self.size - bytes_each)
        if outside.any():
            raise PtxError(f"out of bounds: {self.name} address {int(start[outside][0]):#x}")
        entries = start // self.granule + np.arange(bytes_each // self.granule)[:, None]
        if (self.state[entries] == _FREE).any():
            raise PtxError(f"out of bounds: {self._where(entries, self.state[entries] == _FREE, who)}")
        return entries

    def _after(self, entries: np.ndarray, who: Actors) -> np.ndarray:
        """Whether the last write of the entries comes before an access by `who` now."""
        block, warp, epoch = (column[entries] for column in self.writer)
        return (block == NOBODY) | ((block == who.block) & ((epoch < who.epoch) | (warp == who.warp)))

    def _read_is_ordered(self, entries: np.ndarray, who: Actors) -> None:
        ordered = self._after(entries, who)
        if not ordered.all():
            raise PtxError(f"race: reads {self._where(entries, ~ordered, who)}, written since the last barrier")
        block, warp, epoch = (column[entries] for column in self.reader)
        other_block = (block != NOBODY) & (block != who.block)
        other_warp = (epoch == who.epoch) & (warp != who.warp) & (block != NOBODY)
        block, warp = np.where(other_block, MANY, who.block), np.where(other_warp, MANY, who.warp)
        for column, value in zip(self.reader, (block, warp, who.epoch), strict=True):
            column[entries] = value
        # Where several warps read an entry in this step, the last one was noted: mark what the others see.
        for column, value in zip(self.reader, (block, warp), strict=False):
            lost = column[entries] != value
            if lost.any():
                column[entries[lost]] = MANY

    def _write_is_ordered(self, entries: np.ndarray, who: Actors) -> None:
        ordered = self._after(entries, who)
        block, warp, epoch = (column[entries] for column in self.reader)
        ordered &= (block == NOBODY) | ((block == who.block) & ((epoch < who.epoch) | (warp == who.warp)))
        if not ordered.all():
            raise PtxError(f"race: writes {self._where(entries, ~ordered, who)}, accessed since the last barrier")
        for column, value in zip(self.writer, (who.block, who.warp, who.epoch), strict=True):
            column[entries] = value
        alone = (self.writer[0][entries] == who.block) & (self.writer[1][entries] == who.warp)
        if not alone.all():
            raise PtxError(f"race: writes {self._where(entries, ~alone, who)}, which another warp writes too")

    def _count(self, start: np.ndarray, bytes_each: int, who: Actors, verb: str) -> None:
        sectors = start // _SECTOR + np.arange(-(-bytes_each // _SECTOR))[:, None]
        self.touched[verb].append(np.unique(who.block.astype(np.int64) * self.size + sectors))

    def traffic(self) -> Traffic:
        """What the blocks touched, if `counts` is set."""
        totals = Traffic()
        for verb, seen in self.touched.items():
            sectors = np.unique(np.concatenate(seen or [np.zeros(0, np.int64)])) % self.size
            for start, end, name in self.regions:
                inside = (sectors >= start // _SECTOR) & (sectors < -(-end // _SECTOR))
                getattr(totals, verb)[name] = _SECTOR * int(inside.sum())
        return totals

    def _where(self, entries: np.ndarray, wrong: np.ndarray | None, who: Actors) -> str:
        """The first wrong granule, in words."""
        which = np.argwhere(np.ones(entries.shape, bool) if wrong is None else wrong)[0]
        byte, lane = int(entries[tuple(which)]) * self.granule, which[1]
        region = [(name, byte - start) for start, end, name in self.regions if start <= byte < end]
        place = f"byte {region[0][1]} of {region[0][0]}" if region else f"{self.name} byte {byte:#x}"
        return f"{place} (block {int(who.block[lane])}, warp {int(who.warp[lane])})"
