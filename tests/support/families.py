"""Tiny random models of many architectures: those that keysieve compiles whole, and those that it refuses, with why."""

from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from support.tiny_models import BUILDERS, DECODERS, EOS, POSITIONS, VOCABULARY, seeded, shape

GROUPED = {"num_key_value_heads": 2}
HEADS_OF_16 = {**GROUPED, "head_dim": 16}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {**MIXTURE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
WINDOW = 24
MIXED: dict[str, Any] = {"sliding_window": WINDOW}
MIXED |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
# Chunks, a norm after RoPE, and a layer without RoPE whose queries grow every 16 tokens.
CHUNKED: dict[str, Any] = {"intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": WINDOW}
CHUNKED |= {"layer_types": ["chunked_attention", "full_attention", "full_attention"]}
CHUNKED |= {"no_rope_layers": [1, 1, 0], "floor_scale": 16}
# State that is carried from token to token beside the cache.
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Transformers' own two ways of linear attention differ by 4e-4 with weights as large as those of the others.
LINEAR |= {"shared_expert_intermediate_size": 32, "initializer_range": 0.1}
STATE_SPACE: dict[str, Any] = LINEAR | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2}
STATE_SPACE |= {"position_embedding_type": "rope"}
STATE_SPACE |= {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 64}
# GPT-J and its kin call their sizes by other names.
SHORT_NAMES: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
SHORT_NAMES |= {"n_positions": POSITIONS, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": EOS}
FALCON: dict[str, Any] = {"multi_query": True, "alibi": False, "num_hidden_layers": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONGROPE |= {"original_max_position_embeddings": 1024}


def family(prefix: str, config: str = "", **options: Any) -> Callable[[], PreTrainedModel]:
    """Builds {prefix}ForCausalLM from {config or prefix}Config."""

    def build() -> PreTrainedModel:
        model = getattr(transformers, f"{prefix}ForCausalLM")
        short = prefix in ("GPTJ", "CodeGen")
        made = getattr(transformers, f"{config or prefix}Config")(**(SHORT_NAMES if short else shape(**options)))
        return model(made)

    return build


# Name -> how it is built, and which dims of a head form a pair in layers with full attention: "nope" where these do not
# rotate, "" where the masked reference cannot hook the model.
COMPILED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mistral": (family("Mistral", **GROUPED, sliding_window=None), "half_split"),
    "mixtral": (family("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2), "half_split"),
    "ministral3": (family("Ministral3", **HEADS_OF_16), "half_split"),
    "qwen2": (family("Qwen2", **GROUPED), "half_split"),
    "qwen3_moe": (family("Qwen3Moe", **HEADS_OF_16, **MIXTURE, num_experts=4), "half_split"),
    "gemma": (family("Gemma", **HEADS_OF_16), "half_split"),
    "phi": (family("Phi", **GROUPED), "half_split"),
    "phi3": (family("Phi3", **GROUPED), "half_split"),
    "gptj": (family("GPTJ"), ""),
    "olmo2": (family("Olmo2", **GROUPED), "half_split"),
    "granite": (family("Granite", **GROUPED, attention_multiplier=0.3, embedding_multiplier=2.0), "half_split"),
    "starcoder2": (family("Starcoder2", **GROUPED, sliding_window=None), "half_split"),
    "stablelm": (family("StableLm", **GROUPED), "half_split"),
    "falcon": (family("Falcon", **FALCON), ""),
    "glm": (family("Glm", **HEADS_OF_16), "interleaved"),
    "glm4": (family("Glm4", **HEADS_OF_16), "interleaved"),
    "glm4_moe": (family("Glm4Moe", **HEADS_OF_16, **ROUTED), "half_split"),
    "nemotron": (family("Nemotron", **HEADS_OF_16), "half_split"),
    "exaone4": (family("Exaone4", **GROUPED, sliding_window=None, layer_types=["full_attention"] * 3), "half_split"),
    "helium": (family("Helium", **HEADS_OF_16), "interleaved"),
    "ernie4_5": (family("Ernie4_5", **HEADS_OF_16), "interleaved"),
    "deepseek_v3": (family("DeepseekV3", **LATENT, **ROUTED), "half_split, last"),
    "deepseek_v2": (family("DeepseekV2", **LATENT, **ROUTED, head_dim=8), "interleaved, last"),
    "llama4": (family("Llama4", "Llama4Text", **HEADS_OF_16, **CHUNKED), "interleaved"),
    "mistral, windows": (family("Mistral", **GROUPED, sliding_window=WINDOW), "half_split"),
    "ministral": (family("Ministral", **HEADS_OF_16, **MIXED), "half_split"),
    "gemma2": (family("Gemma2", **HEADS_OF_16, **MIXED), "half_split"),
    "gemma3": (family("Gemma3", "Gemma3Text", **HEADS_OF_16, **MIXED), "half_split"),
    "cohere2": (family("Cohere2", **GROUPED, **MIXED), "nope"),
    "olmo3": (family("Olmo3", **GROUPED, **MIXED), "half_split"),
    "exaone4, windows": (family("Exaone4", **GROUPED, **MIXED), "nope"),
    "gpt_oss": (
        family("GptOss", **HEADS_OF_16, **MIXED, num_local_experts=4, num_experts_per_tok=2),
        "half_split",
    ),
    "qwen3_next": (family("Qwen3Next", **HEADS_OF_16, **LINEAR), "half_split"),
    "granitemoehybrid": (family("GraniteMoeHybrid", **GROUPED, **STATE_SPACE), "half_split"),
    "lfm2": (family("Lfm2", **GROUPED, layer_types=["conv", "full_attention", "conv"]), "half_split"),
    **{name: (BUILDERS[name], "interleaved" if name == "cohere" else "half_split") for name in DECODERS},
}

REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "phi3, longrope": (
        family("Phi3", **GROUPED, rope_parameters=LONGROPE, original_max_position_embeddings=1024),
        "change with the length, from 1,025 tokens",
    ),
    "hunyuan": (family("HunYuanDenseV1", **HEADS_OF_16), r"what follows RoPE \(half_split\) does not commute"),
    "gpt2": (BUILDERS["gpt2"], "none of the 2 attention layers has a rotary embedding"),
}


# The reference hooks in where a model calls transformers' AttentionInterface; these did not before these versions.
HOOKED_FROM = {"nemotron": "5.15"}


def pairing_of(name: str) -> str:
    """COMPILED's pairing, "" where the masked reference cannot hook the model in this version of transformers."""
    hooked = Version(transformers.__version__) >= Version(HOOKED_FROM.get(name, "5"))
    return COMPILED[name][1] if hooked else ""


def family_model(name: str) -> PreTrainedModel:
    """The model of COMPILED or REFUSED, the same weights in every call."""
    return seeded((COMPILED | REFUSED)[name][0])
