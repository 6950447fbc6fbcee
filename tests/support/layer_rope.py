"""The rotation of a model's layers, found by its own rotary module, and undone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from support.masked_forward import layer_window

# Model type -> which dims of a rotated head form a pair; a model that is not listed is refused.
PAIRING = {
    "llama": "half_split",
    "qwen2": "half_split",
    "qwen3": "half_split",
    "gpt_neox": "half_split",
    "smollm3": "half_split",
    "cohere": "interleaved",
}


@dataclass(frozen=True)
class LayerRope:
    """The rotation of one layer: first and second dim of each band's pair [R/2], radians per position [R/2].

    turns(N) gives s * exp(i w p) as the model computes it, [N,R/2] complex for positions 0..N-1. A layer
    without rotation has no bands. The dims outside all pairs (`plain`) are not rotated. grows(positions [N]) is
    the factor of the queries at those positions.
    """

    first: np.ndarray
    second: np.ndarray
    frequency: np.ndarray
    scaling: float
    head_dim: int
    turns: Callable[[int], np.ndarray]
    grows: Callable[[np.ndarray], np.ndarray] = np.ones_like

    @property
    def plain(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.head_dim), np.concatenate([self.first, self.second]))

    def bands(self, x: np.ndarray) -> np.ndarray:
        """The rotated dims of x [...,D] as complex numbers [...,R/2]."""
        return x[..., self.first] + 1j * x[..., self.second]

    def undo(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pre-RoPE values (float64) of post-RoPE x [...,N,D] whose rows stand at positions [N]."""
        result = x.astype(np.float64)
        if len(self.first):
            z = self.bands(result) / self.turns(int(positions.max()) + 1)[positions]
            result[..., self.first], result[..., self.second] = z.real, z.imag
        return result


def layer_ropes(model: PreTrainedModel, pairing: str | None = None) -> list[LayerRope]:
    """The rotation of every layer with full attention, from the model's own rotary module.

    pairing: "half_split", "interleaved" (", last" where the last dims of a head are rotated) or "nope"; by default what
    PAIRING says of the model type.
    """
    config = model.config
    pairing, _, place = (pairing or PAIRING[config.model_type]).partition(", ")
    # Where kinds of layers have tables of their own, the full ones have this.
    names = ("inv_freq", "full_attention_inv_freq")
    rotary, name = next((m, name) for m in model.modules() for name in names if hasattr(m, name))
    kind = {} if name == "inv_freq" else {"layer_type": "full_attention"}
    inv_freq = getattr(rotary, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):  # latent attention; its head_dim may be the rotated part alone
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    bands = np.arange(len(inv_freq))
    first = bands if pairing == "half_split" else 2 * bands
    second = bands + len(bands) if pairing == "half_split" else 2 * bands + 1
    start = head_dim - 2 * len(bands) if place == "last" else 0

    def turns(count: int) -> np.ndarray:
        table = rotary(torch.zeros(1), torch.arange(count)[None], **kind)
        if isinstance(table, torch.Tensor):  # of complex numbers
            return table[0].to(torch.complex128).numpy()
        cos, sin = table
        # A model's table has every band twice (one half after the other, or side by side), or once.
        column = second if pairing == "interleaved" and bool((cos[..., 0] == cos[..., 1]).all()) else bands
        return (cos[0, :, column].double() + 1j * sin[0, :, column].double()).numpy()

    def grows(positions: np.ndarray) -> np.ndarray:
        if not getattr(config, "attn_temperature_tuning", False):
            return np.ones(len(positions))
        return 1 + config.attn_scale * np.log1p((positions + 1) // config.floor_scale)

    none = np.array([], dtype=int)
    frequency = inv_freq.double().numpy()
    scaling = float(getattr(rotary, name.replace("inv_freq", "attention_scaling")))
    rotated = LayerRope(start + first, start + second, frequency, scaling, head_dim, turns)
    plain = LayerRope(none, none, np.zeros(0), 1.0, head_dim, turns, grows)
    uses = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers  # 1: the layer rotates
    return [rotated if uses[layer] and pairing != "nope" else plain for layer in full_layers(config)]


def full_layers(config: Any) -> list[int]:
    """The layers with attention that sees the whole past."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [n for n, kind in enumerate(kinds) if kind == "full_attention" and not any(layer_window(config, n))]
