"""The paper's own HuggingFace code, from a folder that the user gives (--official DIR); nothing of it lies here.

Every layer and head keeps rows of its own, the prompt counts and can be pruned, and a round comes at budget + interval:
keysieve's defaults. It reads keysieve's statistics in its own format, `statistics`.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from contestants.hf import HuggingFace
from contestants.worker import serve


class Official(HuggingFace):
    def load(self, model: str, budget: int, interval: int, folder: str, statistics: str, **setting: Any) -> None:
        super().load(model=model, **setting)
        sys.path.insert(0, folder)
        from triattention.methods.triattention import apply_triattention_patch

        apply_triattention_patch(
            self.model,
            stats_path=Path(statistics),
            model_path=Path(model),
            kv_budget=budget,
            offset_max_length=4096,
            divide_length=interval,
            use_slack_trigger=True,
            count_prompt_tokens=True,
            allow_prefill_compression=True,
            per_layer_perhead_pruning=True,
        )

    def prefill(self, tokens: list[int]) -> None:
        self.cache, self.position = self.new_cache(), 0
        self.feed(torch.tensor(tokens).expand(self.batch, -1))  # at once: its code takes a second chunk for decoding

    def feed(self, tokens: torch.Tensor) -> None:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values  # a new one after every step
        self.last = out.logits[:, -1].argmax(-1)


if __name__ == "__main__":
    serve(Official())
