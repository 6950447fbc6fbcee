"""ONNX Runtime GenAI: the plain decoder of ONNX Runtime's own model builder, with a cache that only grows.

Its graph has GroupQueryAttention, and MatMulNBits for int4 weights; past and present share one buffer.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

from contestants.worker import Contestant, serve


class OnnxRuntimeGenAI(Contestant):
    def load(self, model: str, batch: int, threads: int, longest: int, **_: Any) -> None:
        decoder = json.loads((Path(model) / "genai_config.json").read_text())["model"]["decoder"]
        self.row_bytes = decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * 2 * 4
        config = genai.Config(model)
        sessions = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": sessions, "eos_token_id": []}}))  # nothing ends a sequence
        self.model = genai.Model(config)
        self.batch, self.longest = batch, longest

    def prefill(self, tokens: list[int]) -> None:
        options = genai.GeneratorParams(self.model)
        options.set_search_options(max_length=self.longest, batch_size=self.batch, do_sample=False)
        self.generator = genai.Generator(self.model, options)
        self.generator.append_tokens([tokens] * self.batch)
        self.generator.generate_next_token()

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def kv_bytes(self) -> int:
        return self.batch * self.longest * self.row_bytes

    def rows(self) -> int:
        return len(self.generator.get_sequence(0)) - 1  # the newest token has not been fed yet

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")}


if __name__ == "__main__":
    serve(OnnxRuntimeGenAI())
