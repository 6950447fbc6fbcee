"""A session on torch: every buffer stays where it is, and on a GPU steps of one size are replayed as a CUDA graph.

A step reads lengths, positions and the pending plan from the device, and leaves the next ones there. So the host
launches steps without waiting; while it decodes, it is one step ahead of the tokens that it reads.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from keysieve.compiler.decoding import Tokens, prefill
from keysieve.compiler.rows import Rows
from keysieve.compiler.runtimes.torch.memory import IN_CACHES
from keysieve.compiler.runtimes.torch.program import Program
from keysieve.compiler.runtimes.torch.replay import Replay
from keysieve.compiler.runtimes.torch.sampler import DeviceSampler
from keysieve.compiler.sampling import Sampling
from keysieve.compiler.session import Counters

OF_A_STEP = ("input_ids", "logits_at")  # inputs whose size is that of a step
ONE = 1, 1  # a step of one token, whose logits are wanted


class TorchSession:
    """As keysieve.compiler.session.Session, on a Program.

    decoder: runs the module for steps of one token, where it is another than the program's (a compiled one). sizes: of
    the program's inputs, by name. release: called by `close`.
    """

    def __init__(
        self,
        program: Program,
        decoder: Callable[..., tuple[Tensor, ...]],
        replay: Replay,
        rows: Rows,
        sizes: dict[str, int],
        layers: int,
        release: Callable[["TorchSession"], None],
    ):
        self._program, self._decoder, self._replay, self._release = program, decoder, replay, release
        self._device = replay.device
        self.whole_chunks = replay.captures
        self.ahead = int(self._device.type == "cuda")  # steps that run while the host reads; a CPU has no time to spare
        self.layers = layers
        self._held = {
            one.name: torch.zeros(one.sized(sizes), dtype=one.dtype, device=self._device)
            for one in program.inputs
            if one.name not in OF_A_STEP
        }
        for table, names in program.tables.items():
            self._held[table].copy_(torch.tensor([self._held[name].data_ptr() for name in names]))
        self._steps: dict[tuple[int, int], dict[str, Tensor]] = {}  # by tokens and wanted logits
        self._rounds = torch.zeros(rows.batch, dtype=torch.int64, device=self._device)
        self._ends = torch.zeros(sizes["vocabulary"], dtype=torch.bool, device=self._device)  # tokens that end a text
        self._samplers: dict[Sampling, DeviceSampler] = {}
        self._drawn = torch.zeros(rows.batch, dtype=torch.int64, device=self._device)
        self.kv_bytes = sum(held.nbytes for name, held in self._held.items() if name.startswith(IN_CACHES))
        self.reset(rows, None, {})

    def reset(self, rows: Rows, pinned: Sequence[int] | None, initial: dict[str, np.ndarray]) -> None:
        """Start anew, with sequences of no token, in the same buffers: rows must be as large as the first.

        pinned, initial: as Session's. What the caches held stays behind the rows held.
        """
        self._rows, self.batch, self.capacity, self._open = rows, rows.batch, rows.capacity, True
        for name, tensor in self._held.items():
            if not name.startswith(("key_", "value_", "plan", "addresses")):
                tensor.zero_()
        self._rounds.zero_()
        for suffix, budget in zip(rows.suffixes, rows.budgets, strict=True):
            self._put(f"keep{suffix}", np.full(self.batch, -1, np.int32))
            self._put(f"budget{suffix}", budget)
        self._put("pinned", np.zeros(self.batch, np.int32) if pinned is None else np.asarray(pinned, np.int32))
        for name, value in initial.items():  # [L, 1, ...] -> [L, B, ...]
            self._put(name, np.repeat(value.astype(np.float32), self.batch, axis=1))
        self._put_limit: np.ndarray | None = None

    def _put(self, name: str, value: np.ndarray) -> None:
        if name in self._held:  # a dense engine reads neither budget nor centres
            self._held[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))

    # -- what it holds ------------------------------------------------------------------------------------------------
    @property
    def rows(self) -> np.ndarray:
        """Rows held [B] once the pending plan is executed; of the first window where no layer evicts."""
        if not self._rows.evicts:
            return self._read("window_length_0")
        return self._rows.average(self.rows_of_classes)

    @property
    def rows_of_classes(self) -> np.ndarray:
        """Rows held [K,B] by a KV head of each class, once the pending plan is executed."""
        suffixes = self._rows.suffixes
        keep, length = (np.stack([self._read(f"{name}{end}") for end in suffixes]) for name in ("keep", "length"))
        return np.where(keep >= 0, keep, length)

    @property
    def position(self) -> np.ndarray:
        """Tokens fed [B]."""
        return self._read("position")

    @property
    def counters(self) -> Counters:
        """A snapshot of the counters, read from the device; planned evictions count as done."""
        tokens, rounds = self.position, self._rounds.tolist()
        rows = self.rows  # an average that is rounded; what else was read is gone
        gone = tokens - rows if self._rows.evicts else np.zeros(self.batch, int)
        sizes = self.batch, self.layers, self.capacity, self.kv_bytes
        held = self._holders(tokens), self._rows.heads
        return Counters(*sizes, tokens.tolist(), rows.tolist(), gone.tolist(), rounds, *held)

    def _holders(self, tokens: np.ndarray) -> list[list[int]]:
        """As count_holders, on the device, since all heads' positions are many bytes to send."""
        states = [(self._held[name], end) for name, end in self._rows.token_states.items() if name in self._held]
        if not states:
            return []
        longest = int(tokens.max())
        counts = torch.zeros(self.batch, longest + 1, dtype=torch.int32, device=self._device)  # the last: of no token
        for positions, end in states:
            row = torch.arange(positions.shape[2], device=self._device)
            held = (row < self._held[f"length{end}"][:, None])[:, None]  # [B,1,C]
            for layer in positions.view(-1, self.batch, *positions.shape[1:3]):
                rows = torch.where(held, layer, longest).long().flatten(1)
                counts.scatter_add_(1, rows, counts.new_ones(()).expand_as(rows))
        return [count[: int(read)] for count, read in zip(counts.tolist(), tokens, strict=True)]

    def _read(self, name: str) -> np.ndarray:
        return self._held[name].cpu().numpy()

    # -- steps --------------------------------------------------------------------------------------------------------
    def step(self, input_ids: np.ndarray, count: np.ndarray, logits_at: np.ndarray, next_tokens: int = 1) -> np.ndarray:
        """As Session's."""
        return self.feed(input_ids, count, logits_at, next_tokens).cpu().numpy()

    def feed(self, input_ids: np.ndarray, count: np.ndarray, logits_at: np.ndarray, next_tokens: int = 1) -> Tensor:
        """As `step`, with logits that stay on the device."""
        tokens, count = input_ids.shape[1], np.asarray(count, np.int32)
        limit = self._rows.limit(tokens, count, next_tokens)
        size = tokens, logits_at.shape[1]
        for name, value in (("input_ids", input_ids), ("logits_at", logits_at)):
            self._inputs(size)[name].copy_(torch.from_numpy(np.ascontiguousarray(value, np.int64)))
        self._put("count", count)
        self._put_changed_limit(limit)
        logits = self._replay(size, lambda: self._advance(size))
        self._rows.advance(tokens, count, limit)
        return logits

    def _inputs(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """Buffers for steps of that many tokens and wanted logits."""
        if size not in self._steps:
            shapes = zip(OF_A_STEP, size, strict=True)
            self._steps[size] = {
                name: torch.zeros(self.batch, width, dtype=torch.int64, device=self._device) for name, width in shapes
            }
        return self._steps[size]

    def _put_changed_limit(self, limit: np.ndarray) -> None:
        if self._put_limit is None or not np.array_equal(limit, self._put_limit):
            for suffix, rows in zip(self._rows.suffixes, limit, strict=True):
                self._put(f"limit{suffix}", rows)
            self._put_limit = limit

    def _advance(self, size: tuple[int, int]) -> Tensor:
        """Launch a step; returns its logits [B,N,V]."""
        held = self._held | self._inputs(size)
        run = self._decoder if size[0] == 1 else self._program.module
        logits, *evicted = run(*(held[one.name] for one in self._program.inputs))
        if evicted:  # by each class of heads
            self._rounds += torch.stack(evicted).amax(0) > 0
        return logits

    # -- decoding -----------------------------------------------------------------------------------------------------
    def decode(
        self, prompts: Sequence[Sequence[int]], chunk: int, sampling: Sampling, stops: set[int], most: int
    ) -> Tokens:
        """As Session's. On a GPU, the step after the one whose tokens are read runs already, up to `most` tokens.

        So a sequence that the caller ends there, for another reason than its token, takes part in one step more.
        """
        sampler = self._sampler(sampling)
        self._ends.zero_()
        self._ends[[token for token in stops if 0 <= token < len(self._ends)]] = True
        logits = prefill(self, prompts, chunk)
        self._held["count"].fill_(1)
        sampler.refill()
        self._draw(sampler, logits)
        waiting = deque([self._sent()])
        going, launched = np.ones(self.batch, np.int32), 1
        while waiting or launched < most:
            while launched < most and len(waiting) <= self.ahead:
                limit = self._rows.limit(1, going, 1)
                self._put_changed_limit(limit)
                sampler.refill()
                self._replay(sampler, lambda: self._draw(sampler, self._advance(ONE)[:, 0]))
                self._rows.advance(1, going, limit)
                waiting.append(self._sent())
                launched += 1
            after = np.asarray((yield waiting.popleft()()), np.int32)
            if (after != going).any():
                self._held["count"].mul_(torch.from_numpy(after).to(self._device))
                going = after

    def _sampler(self, sampling: Sampling) -> DeviceSampler:
        """One a kind, since graphs hold its buffers."""
        kind = replace(sampling, seed=None)
        sampler = self._samplers.setdefault(kind, DeviceSampler(kind, self.batch, self._device))
        sampler.start(sampling.seed)
        return sampler

    def _draw(self, sampler: DeviceSampler, logits: Tensor) -> Tensor:
        """logits [B,V] -> the tokens [B] that the next step of one token reads; those that ended read no more."""
        self._drawn.copy_(sampler(logits))
        self._inputs(ONE)["input_ids"].copy_(self._drawn[:, None])
        self._held["count"].mul_(~self._ends[self._drawn])
        return self._drawn

    def _sent(self) -> Callable[[], list[int]]:
        """Send the drawn tokens to the host; what is returned waits for them."""
        if self._device.type != "cuda":
            tokens = self._drawn.tolist()
            return lambda: tokens
        there = torch.empty(self.batch, dtype=torch.int64, pin_memory=True)
        there.copy_(self._drawn, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> list[int]:
            arrived.synchronize()
            return there.tolist()

        return wait

    def close(self) -> None:
        """Hand the buffers back."""
        if self._open:
            self._open = False
            self._release(self)
