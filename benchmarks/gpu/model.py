"""A model of Qwen3-8B's shape with random weights: its program is made anywhere, its weights where it runs."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gpu.sizes import QWEN3_8B, TINY, Shape
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine
from keysieve.compiler.model import load_skeleton
from keysieve.compiler.pipeline import engine_graph, find, model_sizes
from keysieve.compiler.progress import Progress
from keysieve.compiler.runtimes.torch import TorchRuntime
from keysieve.export.torch import write_program

SPREAD = 0.02  # of random weights


def configuration(tiny: bool) -> Any:
    from transformers import Qwen3Config

    shape, (width, inner, words) = (TINY, (64, 96, 320)) if tiny else (QWEN3_8B, (4096, 12288, 151936))
    return Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        vocab_size=words,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )


def eviction(shape: Shape) -> EvictionConfig:
    interval = shape.rows - shape.budget
    policy = PolicyConfig("triattention", centres="online")
    return EvictionConfig(policy, shape.budget, interval, sinks=shape.sinks, recent=shape.recent)


def prepare(folder: Path, tiny: bool = False) -> None:
    """Write program.json, manifest.json, weights.json (shape and dtype of what is random) and buffers.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = TINY if tiny else QWEN3_8B
    with tempfile.TemporaryDirectory() as model:
        configuration(tiny).save_pretrained(model)
        matched = find(load_skeleton(model, shape.dtype), Progress(quiet=True))
    kept = eviction(shape)
    engine = engine_graph(matched, kept, None)
    manifest = {
        **engine.layout(kept.scope),
        "eviction": asdict(kept),
        "sizes": model_sizes(matched),
        "files": {},
        "vocab_size": configuration(tiny).vocab_size,
        "position_limit": None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    tensors = write_program(engine.graph, folder / "program.json")
    random = {name: t for name, t in tensors.items() if t.dim() and not any(t.stride())}
    described = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in random.items()}
    (folder / "weights.json").write_text(json.dumps(described), encoding="utf-8")
    others = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in random}
    save_file(others, folder / "buffers.safetensors")


def load(folder: Path, device: torch.device, compiled: bool = False) -> Engine:
    """The engine of a prepared folder, without a tokenizer: it takes token ids."""
    generator = torch.Generator(device=device).manual_seed(0)
    weights = load_file(folder / "buffers.safetensors", device=str(device))
    for name, (sizes, kind) in json.loads((folder / "weights.json").read_text()).items():
        dtype = getattr(torch, kind)
        if len(sizes) == 1:  # a norm
            weights[name] = torch.ones(sizes, dtype=dtype, device=device)
        else:
            weights[name] = torch.empty(sizes, dtype=dtype, device=device).normal_(0, SPREAD, generator=generator)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Engine(_Described(folder, manifest), TorchRuntime(folder / "program.json", weights, device, compiled))


class _Described:
    """What an engine reads of a bundle."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
