"""A worker process: reads commands from stdin and answers on stdout, one JSON object a line; nothing but the stdlib.

    {"do": "load", "model": FILE OR FOLDER, "weights": ..., "kv_dtype": ..., "policy": ..., "budget": ..., "batch": 1,
     "threads": 1, "longest": tokens of prompt and generation, "interval": 128}
    {"do": "prefill", "tokens": [...]}     the same prompt for every sequence, after which all caches are fresh
    {"do": "decode", "steps": 128}         greedy
    {"do": ANY OTHER}                      a method of that contestant, with the other fields as its keywords

Every answer has wall_s, cpu_s, rss and peak_rss (bytes), and with a cache kv_bytes and rows; decode adds tokens (of the
first sequence) and step_wall_s and step_cpu_s, one a step. An exception becomes {"error": ...}.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Contestant:
    """What a module of this folder implements; it serves with `serve(ITS_CLASS())`."""

    def load(self, **setting: Any) -> None:
        """Load the model and get ready; `setting` are the fields of the command."""
        raise NotImplementedError

    def prefill(self, tokens: list[int]) -> None:
        """Start anew: every sequence of the batch reads these tokens."""
        raise NotImplementedError

    def step(self) -> int:
        """One greedy token of every sequence; returns the first one's."""
        raise NotImplementedError

    def kv_bytes(self) -> int:
        """Bytes of memory that keys and values take now."""
        raise NotImplementedError

    def rows(self) -> int | None:
        """Rows that the first sequence holds, where the library tells."""
        return None

    def versions(self) -> dict[str, str]:
        """Name -> version of the libraries that did the work."""
        raise NotImplementedError


def serve(contestant: Contestant) -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = _timed(contestant, command)
        except Exception as error:  # noqa: BLE001  (whatever it is, the driver says so)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _timed(contestant: Contestant, command: dict[str, Any]) -> dict[str, Any]:
    kind = command.pop("do")
    started = time.perf_counter(), time.process_time()
    answer = _decode(contestant, **command) if kind == "decode" else getattr(contestant, kind)(**command) or {}
    answer.update(wall_s=time.perf_counter() - started[0], cpu_s=time.process_time() - started[1], **_memory())
    if kind in ("prefill", "decode"):
        answer.update(kv_bytes=contestant.kv_bytes(), rows=contestant.rows())
    if kind == "load":
        answer["versions"] = contestant.versions()
    return answer


def _decode(contestant: Contestant, steps: int) -> dict[str, Any]:
    tokens, walls, cpus = [], [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        tokens.append(contestant.step())
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"tokens": tokens, "step_wall_s": walls, "step_cpu_s": cpus}


def _memory() -> dict[str, int]:
    """Resident and peak resident bytes of this process (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("rss", "VmRSS"), ("peak_rss", "VmHWM"))}
