"""Tiny random decoders in float32, from transformers' own config classes, whose attention is not uniform."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCABULARY = 320  # 3 special tokens, 256 bytes, 61 merges
PAD, BOS, EOS = 0, 1, 2
POSITIONS = 4096

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = (
    "The cache of a decoder holds one key and one value for every token, in every layer and every head. A "
    "rotary embedding turns a key by an angle that grows with its position, so that a product of a query and "
    "a key depends on their distance alone. When the rows of the cache reach the limit, the rows that matter "
    "least are evicted, and the others move together in their order. The positions go on counting."
)


def shape(**changes: Any) -> dict[str, Any]:
    """The options that all config classes share."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return options | changes


def _llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**shape(**({"num_key_value_heads": 2} | changes))))


def _rope(kind: str = "default", theta: float = 10000.0, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **options}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=POSITIONS // 4)  # scaling 1.1386

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_mha": lambda: _llama(num_key_value_heads=4, num_hidden_layers=2),
    "llama_llama3": lambda: _llama(rope_parameters=_LLAMA3),
    "llama_linear": lambda: _llama(
        hidden_size=96,
        num_attention_heads=6,
        rope_parameters=_rope("linear", factor=2.0),
        num_hidden_layers=2,
    ),
    "llama_yarn": lambda: _llama(rope_parameters=_YARN),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape(num_key_value_heads=2, head_dim=32))),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**shape(rope_parameters=_rope(partial_rotary_factor=0.5)))),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**shape(num_key_value_heads=2, logit_scale=0.75))),
    "smollm3": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**shape(num_key_value_heads=2, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]))
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=POSITIONS,
            initializer_range=0.2,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**shape(num_hidden_layers=2))),
}

DECODERS = (
    "llama",
    "llama_mha",
    "llama_llama3",
    "llama_linear",
    "llama_yarn",
    "qwen3",
    "gpt_neox",
    "cohere",
    "smollm3",
)
NEGATIVES = ("gpt2", "bert")


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of DECODERS or NEGATIVES in eval mode, the same weights in every call with the same seed."""
    return seeded(BUILDERS[name], seed)


def seeded(build: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """What `build` makes, in eval mode, with weights that depend on the seed alone and under which mistakes show."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = build().float().eval()
        _make_interesting(model)
    finally:
        torch.set_rng_state(state)
    return model.requires_grad_(False)


def _make_interesting(model: PreTrainedModel) -> None:
    """Weights under which mistakes show: no norm is the identity, no bias is zero, q and k have a centre.

    All tokens share a direction in the embedding, so the queries of a head cluster, as in a trained model.
    """
    for parameter_name, weight in model.named_parameters():
        if parameter_name.endswith("bias"):
            weight.data.normal_(0.0, 0.1)
        elif weight.dim() == 1:
            mean = 1.5 if "q_norm" in parameter_name or "k_norm" in parameter_name else 1.0
            weight.data.normal_(mean, 0.2)
    embedding = model.get_input_embeddings().weight.data
    embedding += torch.randn(embedding.shape[1]) * embedding.std()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with VOCABULARY entries; decode(encode(text)) == text for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(name: str, folder: str | Path, tokenizer: bool = True) -> Path:
    """Write tiny_model(name), with a tokenizer unless told otherwise, as a folder usable as MODEL."""
    return save_model(tiny_model(name), folder, tokenizer)


def save_model(model: PreTrainedModel, folder: str | Path, tokenizer: bool = True) -> Path:
    """Write a tiny model as such a folder."""
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
