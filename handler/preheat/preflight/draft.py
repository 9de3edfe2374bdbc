"""The YAML that `preheat init` writes: what a model folder, a machine, a plan and a measured start
say, as text with comments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preheat.buckets import Bucket
from preheat.config.model import ModelConfig
from preheat.config.yaml_text import read_yaml
from preheat.errors import ModelError
from preheat.preflight.checks import cold_start_seconds, measured_warm_up, pixel_rate
from preheat.preflight.facts import Context, Machine

_LENGTHS = (32, 64, 128, 256, 512)
_POSITIONS = ("max_position_embeddings", "n_positions")
_COARSE = ("StableDiffusion3Pipeline", "FluxPipeline")
"""Pipelines whose sizes are multiples of 16 pixels; the others' are of 8."""
_IMAGE = 224


@dataclass(frozen=True)
class Times:
    """TorchServe's timeouts in seconds, and what a request may cost in them."""

    startup: int
    response: int
    max_cost: int | None
    source: str


@dataclass(frozen=True)
class Draft:
    """A YAML before its timeouts are known."""

    family: str
    path: str
    dtype: str
    batch_size: int
    buckets: Sequence[Bucket]
    """Empty: the model's own."""
    transformers: Mapping[str, Any]
    """The config.json of a module; empty for a pipeline."""
    times: Times = Times(1800, 120, None, "not measured")

    def with_times(self, times: Times) -> Draft:
        return replace(self, times=times)

    def text(self) -> str:
        """The YAML."""
        times, section = self.times, _pipeline if self.family == "pipeline" else _module
        return (
            f"# {self.path}, for this machine, by preheat init: read it before production, and\n"
            "# ask preheat doctor again on the machine that will serve.\n\n"
            "minWorkers: 1                # each holds the whole model\n"
            "maxWorkers: 1\n"
            f"batchSize: {self.batch_size}                 # requests that TorchServe hands over "
            "together\n"
            f"maxBatchDelay: {0 if self.batch_size == 1 else 10}            # milliseconds that a "
            "lone request waits for others\n"
            f"# seconds; twice a cold start or more ({times.source})\n"
            f"startupTimeout: {times.startup}\n"
            f"responseTimeout: {times.response}         # seconds for a whole batch\n"
            f"maxRetryTimeoutInSec: {4 * times.startup}   # must exceed startupTimeout\n\n"
            "pt2:\n"
            "  compile: {enable: true, backend: auto}\n"
            f"{section(self)}"
        )


def drafted(
    place: str, folder: Path, machine: Machine, buckets: Sequence[Bucket], *, on_gpu: bool
) -> Draft:
    """Of the model in `folder`, which the YAML calls `place`.

    Raises:
        ModelError: it is no model that a YAML can be written for.
    """
    native = on_gpu or machine.bfloat16
    dtype = "bfloat16" if native else "float32"
    if (folder / "model_index.json").is_file():
        batch = 4 if on_gpu else 1  # on a CPU two pictures take twice as long as one
        return Draft("pipeline", place, dtype, batch, buckets, {})
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is neither a diffusers nor a transformers folder")
    config = json.loads((folder / "config.json").read_bytes())
    return Draft("module", place, dtype, 8, buckets, config)


def multiple(folder: Path) -> int:
    """What a plan rounds sizes up to: pixels of a pipeline, elements of a module's dimension."""
    index = folder / "model_index.json"
    if not index.is_file():
        return 8
    return 16 if json.loads(index.read_bytes()).get("_class_name") in _COARSE else 8


def times(draft: Draft, config: ModelConfig, context: Context, num_rehearsed: int) -> Times:
    """From the state of a worker that was started with `num_rehearsed` of the draft's buckets."""
    state = context.state or {}
    documented, warm = cold_start_seconds(context), measured_warm_up(state)
    num = max(1, len(draft.buckets))
    measured = (warm or 0.0) * num / max(1, num_rehearsed)
    loading = max(0.0, float(state.get("ready_seconds", 0.0)) - (warm or 0.0))
    startup = max(300, 100 * math.ceil(2 * (max(documented, measured) + loading) / 100))
    source = f"measured: {loading:.0f} s to load, {measured:.0f} s to compile"
    rates = [rate for row in state.get("buckets", []) if (rate := pixel_rate(row))]
    own: Any = config.family
    if not rates or draft.family != "pipeline":
        return Times(startup, 120, None, source)
    volume = max(bucket.volume for bucket in draft.buckets)
    usual = volume * own.defaults.num_inference_steps
    response = max(120, 10 * math.ceil(3 * draft.batch_size * usual * max(rates) / 10))
    most = int(response / 1.5 / draft.batch_size / max(rates))
    figures = 10 ** max(0, len(str(most)) - 2)
    return Times(startup, response, most // figures * figures, source)


def parsed(text: str, folder: Path) -> ModelConfig:
    """The draft's own text as a worker would read it."""
    file = folder / "draft.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        return ModelConfig.parse(read_yaml(file))
    finally:
        file.unlink()


def _pipeline(draft: Draft) -> str:
    pairs = ", ".join(f"[{bucket.height}, {bucket.width}]" for bucket in draft.buckets)
    side = max((max(bucket.height, bucket.width) for bucket in draft.buckets), default=0)
    cost = draft.times.max_cost
    known = {"max_side": side, "max_cost": cost}
    limits = ", ".join(f"{key}: {value}" for key, value in known.items() if value)
    return (
        "  shapes:\n"
        "    # [height, width] in pixels; preheat plan --csv chooses them for your users' sizes\n"
        + (f"    buckets: [{pairs}]\n" if pairs else "")
        + "    batch_sizes: dynamic\n"
        "    fit: pad                     # paint in the smallest bucket that covers, and cut\n"
        "    oversize: reject             # larger than every bucket is a 400; or downscale\n\n"
        "pipeline:\n"
        f"  path: {json.dumps(draft.path)}\n"
        f"  dtype: {draft.dtype}\n"
        + (
            "  # max_cost: pixels x steps x pictures of one request that responseTimeout allows\n"
            f"  limits: {{{limits}}}\n"
            if limits
            else ""
        )
    )


def _module(draft: Draft) -> str:
    config = draft.transformers
    name = next(iter(config.get("architectures") or ["AutoModel"]))
    lines = [
        "  shapes:",
        "    batch_sizes: dynamic",
        "    oversize: reject             # longer than every bucket is a 400; or eager",
        "",
        "module:",
        f"  path: {json.dumps(draft.path)}",
        f"  class: {name}",
        f"  dtype: {draft.dtype}",
        "  inputs:",
    ]
    if "vocab_size" in config and not config.get("is_encoder_decoder"):
        lines += _text_inputs(draft, config)
        output = "last_hidden_state" if name.endswith("Model") else "logits"
        whole = "Classification" in name and "Token" not in name
        crop = "{}" if whole else "{crop: {1: sequence}}"
        lines += ["  outputs:", f"    {output}: {crop}"]
    elif config.get("num_channels") == 3 and "ImageClassification" in name:
        lines += _image_inputs(config)
        lines += ["  outputs:", "    logits: {}"]
    else:
        raise ModelError(
            f"{draft.path}: no inputs are known of {name}; declare them as docs/modules.md does"
        )
    return "\n".join(lines) + "\n"


def _text_inputs(draft: Draft, config: Mapping[str, Any]) -> list[str]:
    most = next((config[key] for key in _POSITIONS if key in config), _LENGTHS[-1])
    if config.get("model_type") in ("roberta", "camembert", "xlm-roberta"):
        most -= 2  # they count positions from behind the padding's number
    own = [size for bucket in draft.buckets for _, size in bucket.sizes if size <= most]
    sizes = sorted(own) or [size for size in _LENGTHS if size <= most] or [most]
    pad = config.get("pad_token_id") or 0
    ids = f"dtype: int64, shape: [batch, sequence], buckets: {{sequence: {sizes}}}, pad: {pad}"
    mask = "dtype: int64, shape: [batch, sequence], pad: 0, default: 1, range: [0, 1]"
    lines = [
        "    # each bucket is a length that is compiled; preheat plan --csv chooses them",
        f"    input_ids: {{{ids}}}",
        f"    attention_mask: {{{mask}}}",
    ]
    if config.get("type_vocab_size"):
        types = "dtype: int64, shape: [batch, sequence], pad: 0, default: 0"
        lines.append(f"    token_type_ids: {{{types}}}")
    return lines


def _image_inputs(config: Mapping[str, Any]) -> list[str]:
    side = config.get("image_size") or _IMAGE
    return [
        "    pixel_values:",
        "      shape: [batch, 3, height, width]",
        f"      buckets: {{height: [{side}], width: [{side}]}}",
        "      pad: edge",
        "      # as preprocessor_config.json has it; these are ImageNet's",
        "      normalize: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}",
    ]
