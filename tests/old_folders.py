"""Tiny pipeline folders as an older diffusers wrote them: what people download, not what the
installed version saves.

Their config.json lack keys that today's classes have, name an older version, and the weights are
float16 under `fp16` names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from preheat.models import tiny

NEWER_KEYS = {
    "unet": {"attention_type", "dropout", "reverse_transformer_layers_per_block"},
    "vae": {
        "shift_factor",
        "latents_mean",
        "latents_std",
        "use_quant_conv",
        "use_post_quant_conv",
        "mid_block_add_attention",
    },
}
"""By component: what SDXL base 1.0's files lack."""


def sdxl(folder: Path) -> Path:
    """SDXL base 1.0's layout and configs, `force_upcast` among them."""
    tiny.build("sdxl", folder)
    _age(folder, "0.19.0.dev0", NEWER_KEYS, {"vae": {"force_upcast": True}})
    return folder


def sd15(folder: Path, *, flagged: bool = False) -> Path:
    """Stable Diffusion 1.5's, with a safety checker of the real class, which flags every picture or
    none.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(tiny.build("sd15", folder))
    whole = StableDiffusionPipeline(
        **{name: part for name, part in pipeline.components.items() if part is not None},
        image_encoder=None,
        safety_checker=_safety_checker(flagged),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        requires_safety_checker=True,
    )
    whole.save_pretrained(folder)
    older = {**NEWER_KEYS, "vae": {*NEWER_KEYS["vae"], "force_upcast", "scaling_factor"}}
    _age(folder, "0.6.0", older, {})
    return folder


def _safety_checker(flagged: bool) -> StableDiffusionSafetyChecker:
    sides = {"image_size": 32, "patch_size": 8}
    widths = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checker = StableDiffusionSafetyChecker(
            CLIPConfig(vision_config=sides | widths, projection_dim=32)
        )
    # A cosine is compared with the threshold of each concept: all exceed -2, and none 2.
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.data.fill_(-2.0 if flagged else 2.0)
    return checker


def _age(
    folder: Path,
    version: str,
    dropped: Mapping[str, set[str]],
    changed: Mapping[str, dict[str, Any]],
) -> None:
    for path in [*folder.glob("*/*config.json"), folder / "model_index.json"]:
        part, config = path.parent.name, json.loads(path.read_text())
        if "_diffusers_version" not in config:
            continue  # transformers' own
        # Components that this version did not know are not named at all.
        absent = {key for key, value in config.items() if value == [None, None]} | dropped.get(
            part, set()
        )
        older = {key: value for key, value in config.items() if key not in absent}
        older |= changed.get(part, {}) | {"_diffusers_version": version}
        path.write_text(json.dumps(older, indent=2))
    _halve(folder.glob("*/*.safetensors"))


def _halve(files: Iterable[Path]) -> None:
    """Float16 weights under the names of the `fp16` variant."""
    for path in list(files):
        weights = {name: _half(tensor) for name, tensor in load_file(path).items()}
        save_file(weights, path.with_suffix(f".fp16{path.suffix}"), metadata={"format": "pt"})
        path.unlink()


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
