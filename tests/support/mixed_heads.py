"""A tiny decoder whose layers differ in query heads, KV heads, head dim, value dim, rotary dim and pairing.

No family of transformers has all of that, so the attention is written here; the rest is Llama's. It is registered with
transformers' auto classes, so that a saved folder is a MODEL like any other.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from support.layer_rope import LayerRope
from support.tiny_models import seeded, shape


@dataclass(frozen=True)
class Heads:
    """The attention of one layer; the first rotary_dim dims of a head rotate."""

    query: int
    kv: int
    dim: int
    value_dim: int
    rotary_dim: int
    interleaved: bool = False


# By shape: layers 0 and 3 (which differ in the value dim), 1, 2, 4 (unlike 0 in the rotary dim), and 5 (without RoPE).
LAYERS = (
    Heads(4, 2, 16, 16, 16),
    Heads(6, 3, 8, 8, 8),
    Heads(2, 1, 24, 16, 8, interleaved=True),
    Heads(4, 2, 16, 8, 16),
    Heads(4, 2, 16, 16, 8),
    Heads(2, 2, 8, 8, 0),
)


class MixedHeadsConfig(LlamaConfig):
    model_type = "mixed_heads"
    heads: list | None = None


class Rotation(nn.Module):
    """Positions [B,S] -> cos and sin of the angles of the bands [B,S,R/2]."""

    def __init__(self, rotary_dim: int):
        super().__init__()
        bands = torch.arange(rotary_dim // 2)
        self.register_buffer("inv_freq", 100.0 ** (-2 * bands / rotary_dim))

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        return angles.cos(), angles.sin()


class MixedAttention(nn.Module):
    def __init__(self, config: MixedHeadsConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.heads = heads = Heads(**config.heads[layer_idx])
        self.num_key_value_groups = heads.query // heads.kv  # for transformers' own attention functions
        self.rotation = Rotation(heads.rotary_dim)
        self.q_proj = nn.Linear(config.hidden_size, heads.query * heads.dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, heads.kv * heads.dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, heads.kv * heads.value_dim, bias=False)
        self.o_proj = nn.Linear(heads.query * heads.value_dim, config.hidden_size, bias=False)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B,H,S,D], cos and sin [B,1,S,R/2]."""
        if not self.heads.rotary_dim:
            return x
        turned, plain = x[..., : self.heads.rotary_dim], x[..., self.heads.rotary_dim :]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.heads.interleaved else turned.chunk(2, -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack((a, b), -1).flatten(-2) if self.heads.interleaved else torch.cat((a, b), -1)
        return torch.cat((turned, plain), -1)

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        heads = self.heads
        query = self.q_proj(hidden_states).unflatten(-1, (heads.query, heads.dim)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (heads.kv, heads.dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (heads.kv, heads.value_dim)).transpose(1, 2)
        cos, sin = (part[:, None] for part in self.rotation(position_ids))
        query, key = self.rotated(query, cos, sin), self.rotated(key, cos, sin)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        result, _ = attention(self, query, key, value, attention_mask, scaling=heads.dim**-0.5)
        return self.o_proj(result.flatten(2)), None


class MixedHeadsForCausalLM(LlamaForCausalLM):
    config_class = MixedHeadsConfig

    def __init__(self, config: MixedHeadsConfig):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = MixedAttention(config, number)
        self.post_init()


AutoConfig.register(MixedHeadsConfig.model_type, MixedHeadsConfig)
AutoModelForCausalLM.register(MixedHeadsConfig, MixedHeadsForCausalLM)


def mixed_heads(layers: tuple[Heads, ...] = LAYERS) -> MixedHeadsForCausalLM:
    """The model, with the same weights in every call."""
    heads = [asdict(layer) for layer in layers]
    return seeded(lambda: MixedHeadsForCausalLM(MixedHeadsConfig(**shape(num_hidden_layers=len(layers)), heads=heads)))


def mixed_ropes(model: MixedHeadsForCausalLM) -> list[LayerRope]:
    """The rotations as the masked reference takes them."""
    return [_rope(layer.self_attn) for layer in model.model.layers]


def _rope(attention: MixedAttention) -> LayerRope:
    heads, frequency = attention.heads, attention.rotation.inv_freq.double().numpy()
    bands = np.arange(len(frequency))
    first, second = (2 * bands, 2 * bands + 1) if heads.interleaved else (bands, bands + len(bands))

    def turns(count: int) -> np.ndarray:
        cos, sin = attention.rotation(torch.arange(count)[None])
        return (cos[0].double() + 1j * sin[0].double()).numpy()

    return LayerRope(first, second, frequency, 1.0, heads.dim, turns)
