"""Tiny language models of the real transformers classes, with random weights; see `models.tiny`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

END = "<end>"
MAX_LENGTH = 256
"""Positions."""


def parts(name: str) -> Sequence[Any]:
    """The model of this name and its tokenizer."""
    return MODELS[name]().eval(), tokenizer()


def _llama() -> Any:
    """Fewer heads of keys than of queries."""
    return LlamaForCausalLM(LlamaConfig(**_sizes(), num_key_value_heads=2))


def _qwen() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**_sizes(), num_key_value_heads=2))


def _gpt2() -> Any:
    """Positions from a table."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH}
    return GPT2LMHeadModel(GPT2Config(**sizes, **_vocabulary()))


MODELS: Mapping[str, Callable[[], Any]] = {"llama": _llama, "qwen2": _qwen, "gpt2": _gpt2}


def tokenizer() -> Any:
    """A token for each byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, model_max_length=MAX_LENGTH
    )


def _sizes() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        **_vocabulary(),
    }


def _vocabulary() -> dict[str, Any]:
    size = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    return {
        "vocab_size": size,
        "bos_token_id": None,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
        "initializer_range": 0.2,  # wide enough for logits that differ
    }
