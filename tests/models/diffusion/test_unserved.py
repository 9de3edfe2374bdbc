"""What people bring and we do not serve is refused by name, with what there is instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.diffusion.test_request import refused_of
from preheat.config.diffusion import PipelineConfig
from preheat.errors import ModelError, RequestError
from preheat.models import tiny
from preheat.models.diffusion import unserved
from preheat.models.diffusion.pipeline import FAMILIES, DiffusionPipeline
from preheat.models.diffusion.request import FIELDS
from preheat.models.diffusion.tiny import PIPELINES


@pytest.mark.parametrize("name", sorted(unserved.FIELDS))
def test_a_field_that_is_known_elsewhere_is_refused_with_what_there_is_instead(name: str) -> None:
    assert name not in FIELDS
    error = refused_of(**{name: 1})
    assert (
        error.field == name
        and unserved.FIELDS[name] in error.message
        and "unknown" not in error.message
    )
    assert str(error.body()["message"]).startswith(f"{name} is not served: ")


def _changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


INDEXES: list[tuple[str, dict[str, Any], str]] = [
    ("sdxl", {"_class_name": "StableDiffusionXLControlNetPipeline"}, "ControlNet"),
    ("sd15", {"_class_name": "StableDiffusionControlNetInpaintPipeline"}, "ControlNet"),
    ("sdxl", {"_class_name": "StableDiffusionXLAdapterPipeline"}, "adapter"),
    (
        "sdxl",
        {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        },
        "refiner",
    ),
    (
        "sdxl",
        {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
        "refiner",
    ),
    (
        "sdxl",
        {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"},
        "known: StableDiffusionXLPipeline",
    ),
    ("flux", {"_class_name": "FluxKontextPipeline"}, "known: "),
]
DENOISERS: list[tuple[str, str, dict[str, Any], str]] = [
    ("sd15", "unet", {"in_channels": 9}, "inpainting-only"),
    ("sdxl", "unet", {"in_channels": 8}, "InstructPix2Pix"),
    ("flux", "transformer", {"in_channels": 384}, "Flux Fill"),
    ("sd15", "unet", {"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter"),
]


def refused_folder(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        DiffusionPipeline.load(folder, PipelineConfig(), torch.device("cpu"))
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.mark.parametrize(("family", "index", "named"), INDEXES)
def test_a_folder_of_another_kind_stops_the_load_in_one_line(
    family: str, index: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = tiny.build(family, tmp_path / "model")
    _changed(folder / "model_index.json", **index)
    assert named in refused_folder(folder)


@pytest.mark.parametrize(("family", "part", "config", "named"), DENOISERS)
def test_a_denoiser_that_wants_more_than_noise_stops_the_load_before_its_weights(
    family: str, part: str, config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = tiny.build(family, tmp_path / "model")
    _changed(folder / part / "config.json", **config)
    (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    message = refused_folder(folder)
    assert named in message and "base model" in message


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.json": '{"_class_name": "ControlNetModel"}'}, "ControlNetModel"),
        ({"ip-adapter_sdxl.safetensors": ""}, "IP-Adapter"),
        ({"pytorch_lora_weights.safetensors": ""}, "pipeline.fused_lora"),
        ({"sd_xl_base_1.0.safetensors": ""}, "from_single_file"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_called_what_it_is(
    files: dict[str, str], named: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert named in refused_folder(tmp_path)


@pytest.mark.parametrize("family", PIPELINES)
def test_the_folders_that_are_served_are_not_refused(family: str, tmp_path: Path) -> None:
    folder = tiny.build(family, tmp_path / "model")
    assert unserved.folder_refusal(folder, FAMILIES) is None
    # as a folder says that was saved by another task's pipeline
    for task in ("Img2Img", "Inpaint"):
        name = json.loads((folder / "model_index.json").read_text())["_class_name"]
        _changed(
            folder / "model_index.json", _class_name=name.replace("Pipeline", f"{task}Pipeline")
        )
        assert unserved.folder_refusal(folder, FAMILIES) is None
        _changed(folder / "model_index.json", _class_name=name)


def test_a_refusal_reads_as_a_sentence_about_its_field() -> None:
    assert (
        str(RequestError("is missing", "prompt"))
        == RequestError("is missing", "prompt").body()["message"]
    )
