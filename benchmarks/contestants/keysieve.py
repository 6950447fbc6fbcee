"""keysieve's own engine through its public session API, evicting or dense (policy "dense")."""

import time
from typing import Any

import numpy as np

import keysieve
from contestants.worker import Contestant, serve
from keysieve.compiler.decoding import prefill
from keysieve.compiler.engine import load


class KeySieve(Contestant):
    def load(
        self,
        model: str,
        policy: str,
        budget: int | None,
        batch: int,
        threads: int,
        longest: int,
        interval: int,
        chunk: int | None = None,
        **_: Any,
    ) -> None:
        self.engine = load(model, threads)
        self.chunk = chunk or interval
        self.batch = batch
        if policy == "dense":
            self.setting = {"dense": True, "capacity": longest}
        else:
            self.setting = {"budget": budget, "capacity": budget + max(interval, self.chunk), "chunk": self.chunk}
        self.session = None
        self.one, self.index = np.ones(batch, np.int32), np.zeros((batch, 1), np.int64)

    def prefill(self, tokens: list[int]) -> None:
        if self.session is not None:
            self.session.close()
        self.session = self.engine.session(self.batch, **self.setting)
        self.last = prefill(self.session, [tokens] * self.batch, self.chunk).argmax(-1)

    def step(self) -> int:
        self.last = self.session.step(self.last[:, None], self.one, self.index)[:, 0].argmax(-1)
        return int(self.last[0])

    def kv_bytes(self) -> int:
        return self.session.counters.kv_bytes

    def rows(self) -> int:
        return self.session.counters.rows_held[0]

    def counters(self) -> dict[str, Any]:
        """The session's counters of the first sequence."""
        counters = self.session.counters
        return {name: getattr(counters, name)[0] for name in ("tokens", "rows_held", "rows_evicted", "rounds")}

    def copy(self, rows: int) -> dict[str, float]:
        """Seconds that it takes to copy keys and values of that many rows of every layer once."""
        sizes = [
            self.batch * cache["kv_heads"] * rows * width
            for cache in self.engine.manifest["caches"]
            for width in (cache["head_dim"], cache["value_dim"])
        ]
        dtype = np.dtype(self.engine.manifest.get("kv_dtype", self.engine.manifest["dtype"]))
        pairs = [(np.ones(size, dtype), np.zeros(size, dtype)) for size in sizes]
        for source, target in pairs:
            np.copyto(target, source)  # touches every page
        wall, cpu = time.perf_counter(), time.process_time()
        for source, target in pairs:
            np.copyto(target, source)
        return {"copy_wall_s": time.perf_counter() - wall, "copy_cpu_s": time.process_time() - cpu}

    def idle(self) -> dict[str, float]:
        """CPU microseconds that eviction adds to a step that is not due."""
        from contestants.idle_step import idle_microseconds  # brings onnx, which would count as memory of the engine

        return {"idle_us_cpu": idle_microseconds(self.engine.bundle, self.batch, self.session.capacity)}

    def versions(self) -> dict[str, str]:
        import onnxruntime  # loaded already; importlib.metadata would count as 2 MB of the engine

        return {module.__name__: module.__version__ for module in (keysieve, onnxruntime, np)}


if __name__ == "__main__":
    serve(KeySieve())
