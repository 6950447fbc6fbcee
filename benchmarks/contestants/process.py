"""The driver's side of a worker: starts the process, sends commands, waits for answers."""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from keysieve.errors import KeySieveError

BENCHMARKS = Path(__file__).parents[1]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


class WorkerError(KeySieveError):
    """A worker answered with an error, or ended."""


class Worker:
    """One contestant in a process of its own, on `threads` cores; what it prints goes to the end of `log`."""

    def __init__(self, module: str, python: Path, threads: int, log: Path):
        cores = sorted(os.sched_getaffinity(0))[-threads:]
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            **dict.fromkeys(THREAD_VARIABLES, str(threads)),
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        self._log = log
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [str(python), "-P", "-m", f"contestants.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
                text=True,
            )

    def __call__(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send one command and return its answer. Raises WorkerError for an error, or where the process has ended."""
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps({"do": do, **fields}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"it ended with {self._process.wait()} at {do!r}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{do}: {answer['error']}")
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()
