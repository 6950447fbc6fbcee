"""transformers with a StaticCache and torch.compile: one graph for every decoding step."""

from typing import Any

import torch
from transformers import StaticCache

from contestants.hf import HuggingFace
from contestants.worker import serve


class Compiled(HuggingFace):
    def load(self, **setting: Any) -> None:
        super().load(**setting)
        self.decoding = torch.compile(self.model.forward, fullgraph=True, dynamic=False)

    def new_cache(self) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=self.longest)

    def feed(self, tokens: torch.Tensor) -> None:
        run = self.decoding if tokens.shape[1] == 1 else self.model
        positions = torch.arange(self.position, self.position + tokens.shape[1])
        out = run(tokens, past_key_values=self.cache, position_ids=positions[None], use_cache=True, logits_to_keep=1)
        self.last = out.logits[:, -1].argmax(-1)
        self.position += tokens.shape[1]

    def rows(self) -> int:
        return self.longest  # a static cache is attended to as a whole


if __name__ == "__main__":
    serve(Compiled())
