"""One forward pass of a model over a whole sequence, in which every layer sees the keys that it is told to."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

ATTENTION_NAME = "masked_reference"


@dataclass
class _Recorder:
    """What one forward pass is told and what it leaves: visible(layer, N) -> [Hkv,N,N]; layer -> (q, k), and h [N,d].

    Layers with a sliding window or chunks see those, whatever `visible` says, and leave nothing.
    """

    visible: Callable[[int, int], np.ndarray]
    layers: dict[int, tuple[np.ndarray, np.ndarray]]
    hidden: dict[int, np.ndarray]


_recorder: _Recorder | None = None
_inputs: dict[int, np.ndarray] = {}  # of the modules that have a layer number, by id


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one sequence: query [1,Hq,N,D], key and value [1,Hkv,N,D] -> [1,N,Hq,D]."""
    if _recorder is None:
        raise RuntimeError("the masked_reference attention runs only inside forward()")
    layer, count = int(module.layer_idx), query.shape[2]  # type: ignore[arg-type]
    group = query.shape[1] // key.shape[1]
    window, chunk = layer_window(module.config, layer)
    if window or chunk:
        age = torch.arange(count)[:, None] - torch.arange(count)
        seen = (age >= 0) & (age < window) if window else (age >= 0) & (age <= torch.arange(count)[:, None] % chunk)
        visible = seen.expand(key.shape[1], -1, -1)
    else:
        _recorder.layers[layer] = (query[0].numpy(), key[0].numpy())
        _recorder.hidden[layer] = _inputs[id(module)]
        visible = torch.from_numpy(_recorder.visible(layer, count))
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    heads = []
    for head in range(query.shape[1]):
        logits = query[0, head] @ key[0, head // group].T * scaling  # [N,N]
        if softcap:
            logits = (logits / softcap).tanh() * softcap
        logits = logits.masked_fill(~visible[head // group], -math.inf)
        if sinks is not None:  # a sink is a row whose value is zero
            logits = torch.cat([logits, sinks[head].expand(count, 1)], 1)
        heads.append(logits.softmax(-1)[:, :count] @ value[0, head // group])
    return torch.stack(heads, 1)[None], None


def layer_window(config: Any, layer: int) -> tuple[int, int]:
    """(window, chunk) in tokens of one layer, 0 for none, as the configuration says it."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention" if window else "full_attention"
    if kind == "chunked_attention":
        return 0, config.attention_chunk_size
    return window if kind == "sliding_attention" else 0, 0


AttentionInterface.register(ATTENTION_NAME, _attention)


@contextmanager
def _recording(model: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    global _recorder
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    _recorder = recorder
    hooks = [
        module.register_forward_pre_hook(_keep_input, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "layer_idx")
    ]
    try:
        yield
    finally:
        _recorder = None
        _inputs.clear()
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def _keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = kwargs.get("hidden_states", args[0] if args else None)
    if isinstance(given, torch.Tensor):
        _inputs[id(module)] = given[0].numpy()


def forward(
    model: PreTrainedModel,
    tokens: Sequence[int],
    visible: Callable[[int, int], np.ndarray],
    hidden: list[np.ndarray] | None = None,
) -> tuple[torch.Tensor, list[tuple[np.ndarray, np.ndarray]]]:
    """Logits [N,V] of one whole sequence, and its rotated queries [Hq,N,D] and keys [Hkv,N,D] per full layer.

    hidden: becomes what the attention of these layers is given, [N,d] each.
    """
    recorder = _Recorder(visible, {}, {})
    with torch.no_grad(), _recording(model, recorder):
        positions = torch.arange(len(tokens))[None]
        logits = model(input_ids=torch.tensor([list(tokens)]), position_ids=positions, use_cache=False).logits[0]
    if hidden is not None:
        hidden[:] = [recorder.hidden[layer] for layer in sorted(recorder.hidden)]
    return logits, [recorder.layers[layer] for layer in sorted(recorder.layers)]
