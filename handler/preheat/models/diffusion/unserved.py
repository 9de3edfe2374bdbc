"""What people send and we do not serve, by name: request fields and model folders, each with what
there is instead.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_LORA = "requests bring no LoRA; fuse one when the model is loaded, pipeline.fused_lora in its YAML"
_CONTROL = "ControlNet is not served; image (with strength) and mask_image steer a picture"
_ADAPTER = "IP-Adapter is not served; image (with strength) is what a picture can start from"
_REFINER = "refiners are not served; the base model runs all steps"
_ENCODERS = "every text encoder reads the field {}"
_SCHEDULER = "the scheduler is the model's, pipeline.scheduler in its YAML"
_CHECKED = (
    "whether pictures are checked is the model folder's safety_checker; an answer says flagged"
)

FIELDS: Mapping[str, str] = {
    "lora": _LORA,
    "loras": _LORA,
    "lora_scale": _LORA,
    "lora_weights": _LORA,
    "cross_attention_kwargs": _LORA,
    "joint_attention_kwargs": _LORA,
    "controlnet": _CONTROL,
    "control_image": _CONTROL,
    "controlnet_conditioning_scale": _CONTROL,
    "ip_adapter_image": _ADAPTER,
    "ip_adapter_scale": _ADAPTER,
    "refiner": _REFINER,
    "denoising_start": _REFINER,
    "denoising_end": _REFINER,
    "prompt_2": _ENCODERS.format("prompt"),
    "prompt_3": _ENCODERS.format("prompt"),
    "negative_prompt_2": _ENCODERS.format("negative_prompt"),
    "negative_prompt_3": _ENCODERS.format("negative_prompt"),
    "clip_skip": (
        "the text encoder's last layers are as the model folder has them; none is skipped by "
        "request"
    ),
    "max_sequence_length": (
        "prompts are read to the pipeline's own length; an answer says what was dropped"
    ),
    "guidance_rescale": "guidance is not rescaled; guidance_scale is its strength",
    "eta": _SCHEDULER,
    "scheduler": _SCHEDULER,
    "sampler": _SCHEDULER,
    "sampler_name": _SCHEDULER,
    "timesteps": "the scheduler chooses them; num_inference_steps is their number",
    "sigmas": "the scheduler chooses them; num_inference_steps is their number",
    "safety_checker": _CHECKED,
    "enable_safety_checker": _CHECKED,
    "steps": "use num_inference_steps",
    "cfg_scale": "use guidance_scale",
    "guidance": "use guidance_scale",
    "n": "use num_images, with response_format b64_json or stream",
    "batch_size": "use num_images, with response_format b64_json or stream",
    "num_images_per_prompt": "use num_images, with response_format b64_json or stream",
    "size": "use height and width",
    "init_image": "use image",
    "mask": "use mask_image",
    "denoising_strength": "use strength",
    "output_type": "use output_format, and response_format",
}
"""By the name of a field, what to do without it."""

_BASES = "the base model's own folder is, for text-to-image, image-to-image and inpainting"


def folder_refusal(folder: Path, families: Collection[str]) -> str | None:
    """Why a local folder is no pipeline of `families` (the names of their text-to-image classes),
    if its files say so.

    Read before any weights are: they may be minutes, and diffusers loads a refiner or a
    ControlNet's base as if it were whole.
    """
    index = _read(folder / "model_index.json")
    if index is None:
        return _stray(folder)
    name = str(index.get("_class_name"))
    if "ControlNet" in name or "controlnet" in index:
        return f"{name} holds a ControlNet, which is not served; {_BASES}"
    if "Adapter" in name or "adapter" in index:
        return f"{name} holds an adapter, which is not served; {_BASES}"
    if index.get("requires_aesthetics_score") or _absent(index.get("text_encoder")):
        return (
            f"{name} is a refiner (or has no text encoder of its own), which is not served; "
            f"{_BASES}"
        )
    # diffusers makes each task's pipeline of another's folder.
    if name.replace("Img2Img", "").replace("Inpaint", "") not in families:
        return f"{name} is not served; known: {', '.join(families)}"
    denoiser = (
        _read(folder / "unet" / "config.json")
        or _read(folder / "transformer" / "config.json")
        or {}
    )
    return denoiser_refusal(denoiser)


def denoiser_refusal(config: Mapping[str, Any]) -> str | None:
    """Why a UNet or transformer of this config cannot generate from noise and text alone."""
    if "ip_image_proj" in (config.get("encoder_hid_dim_type"), config.get("addition_embed_type")):
        return f"this UNet was saved with an IP-Adapter, which is not served; {_BASES}"
    channels, out = config.get("in_channels"), config.get("out_channels")
    # A denoiser takes what it gives; SD3's and Flux's transformers name `out_channels` only
    # sometimes.
    known = {
        "UNet2DConditionModel": (4, out),
        "FluxTransformer2DModel": (64, out),
        "SD3Transformer2DModel": (16, out),
    }
    usual = known.get(str(config.get("_class_name")))
    if channels is None or usual is None or channels in usual:
        return None
    kinds = {
        9: "an inpainting-only checkpoint",
        8: "an InstructPix2Pix or depth checkpoint",
        5: "a depth checkpoint",
        384: "Flux Fill",
        128: "Flux Control",
    }
    kind = kinds.get(channels, "made for more than noise")
    return f"its denoiser takes {channels} channels ({kind}), which is not served; {_BASES}"


def _stray(folder: Path) -> str | None:
    """What a folder without model_index.json seems to be; None where nothing shows."""
    names = [path.name for path in folder.iterdir()]
    name = str((_read(folder / "config.json") or {}).get("_class_name", ""))
    if "ControlNet" in name:
        return f"is a ControlNet ({name}), which is not served; {_BASES}"
    if any(one.startswith("ip-adapter") for one in names):
        return f"is an IP-Adapter, which is not served; {_BASES}"
    if "pytorch_lora_weights.safetensors" in names:
        return "is a LoRA; serve its base model and name this folder in pipeline.fused_lora"
    if any(one.endswith((".safetensors", ".ckpt")) for one in names) and not name:
        return (
            "holds a single-file checkpoint; write it as a folder first: "
            "StableDiffusionXLPipeline.from_single_file(...).save_pretrained(...)"
        )
    return None


def _absent(component: object) -> bool:
    """How an index names a component that is not there: `[null, null]`."""
    return isinstance(component, list) and component[-1] is None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # diffusers says better what is wrong with it
    return document if isinstance(document, dict) else None
