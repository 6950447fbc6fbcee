"""Tiny models of several kinds, compiled on this machine: the tokens of the GPU are those of the CPU."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu.place import Place
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.progress import Progress

EVICTION = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)
MODELS = ("llama", "qwen3", "gemma2", "gpt_oss", "mistral, windows", "qwen3_next", "deepseek_v3", "cohere", "lfm2")
WAYS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}, {"dense": True})


def run(place: Place) -> None:
    for name in MODELS[:1] if place.tiny else MODELS:
        place.attempt("tokens", lambda n=name: tokens(place, n), model=name)


def tokens(place: Place, name: str) -> dict[str, Any]:
    from support.families import family_model
    from support.tiny_models import save_model

    generator = torch.Generator().manual_seed(0)
    counts = (70, 9) if place.tiny else (70, 9, 120)
    prompts = [torch.randint(3, 300, (count,), generator=generator).tolist() for count in counts]
    with tempfile.TemporaryDirectory() as folder:
        source = save_model(family_model(name), Path(folder) / "model")
        compile(source, Path(folder) / "bundle", CompileConfig(EVICTION, target="torch"), Progress(quiet=True))
        there = load(Path(folder) / "bundle", device=place.device.type)
        here = load(Path(folder) / "bundle", threads=1)
        found: dict[str, Any] = {"same": 0, "of": 0}
        for options in WAYS if name == MODELS[0] and not place.tiny else WAYS[:1]:
            asked = {"max_new_tokens": 6 if place.tiny else 120, "stop_tokens": [], "chunk": 16, **options}
            answers = [engine.generate(prompts, **asked) for engine in (there, here)]
            for ours, theirs in zip(*answers, strict=True):
                found["same"] += sum(a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
                found["of"] += len(theirs.tokens)
            found.setdefault("rounds", there.counters.rounds)
            found["counters_equal"] = found.get("counters_equal", True) and there.counters == here.counters
        return found
