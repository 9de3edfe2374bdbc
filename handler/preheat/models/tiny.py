"""Tiny models of the real diffusers and transformers classes, made on the spot: the demo's and the
tests'.

Every one has the parts, names and folder layout of the real thing, at a few hundred thousand
parameters, seeded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_WIDTH = 32
# at least twice CLIP_WIDTH: SD3 lays both CLIP states side by side and pads them to T5's width
T5_WIDTH = 64


def build(family: str, folder: Path) -> Path:
    """Write a tiny pipeline of `family` (a key of FAMILIES), or one of MODULES, to `folder`,
    replacing what is there; return `folder`.

    The default picture is 256x256 pixels. Weights are safetensors, the same bytes every time.
    """
    if family not in {**FAMILIES, **MODULES}:
        raise ValueError(f"unknown family {family!r}: one of {', '.join([*FAMILIES, *MODULES])}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [FAMILIES[family]()] if family in FAMILIES else MODULES[family]()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=folder.parent) as scratch:
        for part in parts:
            part.save_pretrained(Path(scratch, "new"))
        if (folder / "model_index.json").exists() or (folder / "config.json").exists():
            folder.rename(Path(scratch, "old"))
        Path(scratch, "new").rename(folder)
    return folder


def _sdxl() -> Any:
    tokenizer = _clip_tokenizer()
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            **UNET,
            cross_attention_dim=2 * CLIP_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            # six size conditions and the pooled text
            projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
        ),
        vae=_vae(latent_channels=4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
    )


def _sd15() -> Any:
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET, cross_attention_dim=CLIP_WIDTH),
        vae=_vae(latent_channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=_clip_tokenizer(),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd3() -> Any:
    tokenizer = _clip_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=96,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_3=T5EncoderModel(_t5_config()),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer(),
    )


def _flux() -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,  # 2x2 latent cells of 16 channels, packed
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=T5EncoderModel(_t5_config()),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
    )


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "sdxl": _sdxl,
    "sd15": _sd15,
    "sd3": _sd3,
    "flux": _flux,
}


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

SCHEDULE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

UNET: Mapping[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
}


def _vae(*, latent_channels: int, scaling_factor: float, shift_factor: float | None = None) -> Any:
    """Four levels, so that a latent cell is 8x8 pixels as in the real ones."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 16, 16],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=256,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _clip_config() -> Any:
    return CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=CLIP_WIDTH,
        intermediate_size=64,
        projection_dim=CLIP_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=3,
        hidden_act="gelu",
    )


def _t5_config() -> Any:
    return T5Config(
        vocab_size=256,
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )


def _clip_tokenizer() -> Any:
    """Byte-level CLIP without merges: 256 bytes, the same at a word's end, and two specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


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


def _t5_tokenizer() -> Any:
    """One piece per printable ASCII character; the rest is unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
