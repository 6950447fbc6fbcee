"""The same shape in transformers, with its static cache: what a user has without keysieve, as transformers runs it."""

import statistics
import time
from typing import Any

import torch

from gpu import model
from gpu.place import Place

ROOM = 64
CASES = ((1, 8192), (8, 8192), (1, 32768), (8, 32768), (32, 8192))


def run(place: Place) -> None:
    from transformers import Qwen3ForCausalLM

    with torch.device(place.device):
        torch.set_default_dtype(torch.float32 if place.tiny else torch.bfloat16)
        hf = Qwen3ForCausalLM(model.configuration(place.tiny)).eval()
        torch.set_default_dtype(torch.float32)
    for batch, history in ((2, 60),) if place.tiny else CASES:
        place.attempt("huggingface", lambda b=batch, h=history: decoding(place, hf, b, h), batch=batch, history=history)
    place.attempt("huggingface prompt", lambda: prompt(place, hf), tokens=60 if place.tiny else 8192)


@torch.no_grad()
def decoding(place: Place, hf: Any, batch: int, history: int) -> dict[str, Any]:
    from transformers import StaticCache

    if not place.tiny:
        torch.cuda.empty_cache()
    cache = StaticCache(config=hf.config, max_cache_len=history + ROOM)
    token, times = torch.full((batch, 1), 5, device=place.device), []
    for step in range(6 if place.tiny else 24):
        start = time.perf_counter()
        position = torch.tensor([history + step], device=place.device)
        logits = hf(token, past_key_values=cache, cache_position=position, position_ids=position[None]).logits
        token = logits[:, -1:].argmax(-1)
        token.tolist()
        times.append(time.perf_counter() - start)
    per_token = statistics.median(times[4:])
    return {"ms": round(1e3 * per_token, 3), "tokens_per_s": round(batch / per_token, 1)}


@torch.no_grad()
def prompt(place: Place, hf: Any) -> dict[str, Any]:
    ids = torch.full((1, 60 if place.tiny else 8192), 5, device=place.device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        hf(ids, logits_to_keep=1).logits.argmax(-1).tolist()
        seconds.append(time.perf_counter() - start)
    return {"s": round(seconds[-1], 3)}
