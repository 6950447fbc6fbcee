"""llama.cpp through llama-cpp-python's low-level API.

policy: window keeps `budget` rows by hand, the first 4 and the last ones, and shifts their positions whenever
`interval` more were added (nothing is scored); dense keeps all. K and V are float16, llama.cpp's default. Flash
attention is off: with it a token took 1.6 times as long.
"""

from importlib.metadata import version
from typing import Any

import llama_cpp as llama
import numpy as np

from contestants.worker import Contestant, serve

SINKS = 4
SILENT = llama.llama_log_callback(lambda level, text, data: None)


class LlamaCpp(Contestant):
    def load(
        self,
        model: str,
        policy: str,
        budget: int | None,
        interval: int,
        batch: int,
        threads: int,
        longest: int,
        **_: Any,
    ) -> None:
        llama.llama_log_set(SILENT, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
        self.window = None if policy == "dense" else budget + interval
        self.batch, self.interval = batch, interval
        self.chunk = interval if self.window else 512
        options = llama.llama_context_default_params()
        options.n_ctx = (self.window or longest) * batch
        options.n_seq_max = batch
        options.n_batch = options.n_ubatch = max(self.chunk, batch)
        options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads = options.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, options)
        self.memory = llama.llama_get_memory(self.context)
        self.tokens = llama.llama_batch_init(options.n_batch, 0, 1)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def prefill(self, tokens: list[int]) -> None:
        llama.llama_memory_clear(self.memory, True)
        for sequence in range(self.batch):
            self.held = 0
            for start in range(0, len(tokens), self.chunk):
                part = tokens[start : start + self.chunk]
                self.make_room(len(part), [sequence])
                self.feed([(token, self.held + n, sequence) for n, token in enumerate(part)], [len(part) - 1])
                self.held += len(part)
        self.last = self.last * self.batch

    def step(self) -> int:
        self.make_room(1, range(self.batch))
        self.feed([(token, self.held, n) for n, token in enumerate(self.last)], range(self.batch))
        self.held += 1
        return self.last[0]

    def make_room(self, new: int, sequences: Any) -> None:
        """Drop the oldest `interval` rows after the sinks, where the window has no room for the new ones."""
        if self.window is None or self.held + new <= self.window:
            return
        end = SINKS + self.interval
        for sequence in sequences:
            llama.llama_memory_seq_rm(self.memory, sequence, SINKS, end)
            llama.llama_memory_seq_add(self.memory, sequence, end, -1, -self.interval)
        self.held -= self.interval

    def feed(self, entries: list[tuple[int, int, int]], wanted: Any) -> None:
        """Run (token, position, sequence) entries, and keep the favourite successors of those at `wanted`."""
        batch = self.tokens
        batch.n_tokens = len(entries)
        for n, (token, position, sequence) in enumerate(entries):
            batch.token[n], batch.pos[n] = token, position
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            batch.logits[n] = n in wanted
        if llama.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        logits = (llama.llama_get_logits_ith(self.context, n) for n in wanted)
        self.last = [int(np.ctypeslib.as_array(row, (self.vocabulary,)).argmax()) for row in logits]

    def kv_bytes(self) -> int:
        """Two float16 caches of every layer."""
        heads, layers = llama.llama_model_n_head_kv(self.model), llama.llama_model_n_layer(self.model)
        width = llama.llama_model_n_embd(self.model) // llama.llama_model_n_head(self.model)
        return llama.llama_n_ctx(self.context) * layers * heads * width * 2 * 2

    def rows(self) -> int:
        return self.held

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": version("llama-cpp-python")}


if __name__ == "__main__":
    serve(LlamaCpp())
