"""Tiny modules of the real transformers classes; see `models.tiny`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)


def parts(name: str) -> Sequence[Any]:
    """The module of this name, and what else its folder holds."""
    return MODULES[name]()


def _bert() -> Sequence[Any]:
    """A masked encoder and its tokenizer; 512 tokens at most."""
    config = BertConfig(
        vocab_size=len(_characters()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    return BertModel(config).eval(), _wordpiece_tokenizer()


def _resnet() -> Sequence[Any]:
    """An image classifier of ten classes."""
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return (ResNetForImageClassification(config).eval(),)


MODULES: Mapping[str, Callable[[], Sequence[Any]]] = {"bert": _bert, "resnet": _resnet}


def _characters() -> list[str]:
    """Printable ASCII, each at a word's start and inside it, and BERT's specials."""
    letters = [chr(code) for code in range(33, 127)]
    return [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]


def _wordpiece_tokenizer() -> Any:
    """BERT's, with a vocabulary of single characters."""
    vocab = {token: index for index, token in enumerate(_characters())}
    inner = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    inner.post_processor = BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **special)
