"""NVIDIA kvpress: its DecodingPress prunes the cache of HuggingFace's model every `interval` decoded tokens.

policy: knorm or snapkv. The prompt is read without a press; so the first pruning is that of the whole prompt.
"""

from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from kvpress import DecodingPress, KnormPress, SnapKVPress

from contestants.hf import HuggingFace
from contestants.worker import serve

PRESSES = {"knorm": KnormPress, "snapkv": SnapKVPress}


class KVPress(HuggingFace):
    def load(self, policy: str, budget: int, interval: int, **setting: Any) -> None:
        super().load(**setting)
        self.press = DecodingPress(PRESSES[policy](), interval, budget, hidden_states_buffer_size=interval)
        self.pressed = ExitStack()

    def prefill(self, tokens: list[int]) -> None:
        self.pressed.close()
        super().prefill(tokens)
        self.pressed.enter_context(self.press(self.model))

    def versions(self) -> dict[str, str]:
        return {"kvpress": version("kvpress"), **super().versions()}


if __name__ == "__main__":
    serve(KVPress())
