"""HuggingFace transformers: eager PyTorch with SDPA attention and a DynamicCache that only grows."""

from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from contestants.worker import Contestant, serve

CHUNK = 512  # prompt tokens a step


class HuggingFace(Contestant):
    def load(self, model: str, batch: int, threads: int, longest: int, **_: Any) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
        self.model.eval()
        self.batch, self.longest = batch, longest

    def prefill(self, tokens: list[int]) -> None:
        self.cache, self.position = self.new_cache(), 0
        for chunk in torch.tensor(tokens).split(CHUNK):
            self.feed(chunk.expand(self.batch, -1))

    def step(self) -> int:
        self.feed(self.last[:, None])
        return int(self.last[0])

    def new_cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def feed(self, tokens: torch.Tensor) -> None:
        """Run tokens [B,S] at the positions that follow, and keep the last one's favourite successor."""
        positions = torch.arange(self.position, self.position + tokens.shape[1])
        out = self.model(
            tokens, past_key_values=self.cache, position_ids=positions[None], use_cache=True, logits_to_keep=1
        )
        self.last = out.logits[:, -1].argmax(-1)
        self.position += tokens.shape[1]

    def kv_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))

    def rows(self) -> int:
        return self.cache.get_seq_length()

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    serve(HuggingFace())
