"""Progress of long work on stderr: one line per finished stage, and a bar where a person is watching."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

Item = TypeVar("Item")
BAR_WIDTH = 24
BAR_SECONDS = 0.1  # least time between two drawings of a bar


class Stage:
    """What a stage says about itself when it ends."""

    def __init__(self) -> None:
        self.text = ""

    def note(self, text: str) -> None:
        """Set what is printed after the time, such as "2,019 nodes"."""
        self.text = text


class Progress:
    """Where progress goes: stderr unless a stream is given; nowhere when quiet."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time the block, then print "capture            12.7 s  2,019 nodes"; print nothing if it raises."""
        stage, start = Stage(), time.perf_counter()
        yield stage
        self._write(f"{name:<16} {time.perf_counter() - start:6.1f} s  {stage.text}".rstrip() + "\n")

    def track(self, items: Iterable[Item], total: int, unit: str = "", step: int = 1) -> Iterator[Item]:
        """Pass `items` on, each worth `step` of `total`; draws a bar only if the stream is a terminal."""
        done = 0
        with self.bar() as report:
            for item in items:
                yield item
                done = min(done + step, total)
                report(unit, done, total)

    @contextmanager
    def bar(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar for work that reports (phase, steps done, steps in all) by itself; drawn only on a terminal."""
        drawn = float("-inf")

        def report(phase: str, done: int, total: int) -> None:
            nonlocal drawn
            if self.stream.isatty() and time.perf_counter() - drawn >= BAR_SECONDS:
                self._write(f"\r\x1b[K{self._bar(done, total)} {done:,}/{total:,} {phase}")
                drawn = time.perf_counter()

        try:
            yield report
        finally:
            if self.stream.isatty():
                self._write("\r\x1b[K")  # back to the line's start, and erase it

    @staticmethod
    def _bar(done: int, total: int) -> str:
        filled = BAR_WIDTH * done // max(total, 1)
        return "[" + "#" * filled + "." * (BAR_WIDTH - filled) + "]"

    def _write(self, text: str) -> None:
        if not self.quiet:
            self.stream.write(text)
            self.stream.flush()
