"""The model YAML: what loads, what it means, and what an error says."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError

from preheat.buckets import Bucket
from preheat.config.diffusion import PipelineConfig
from preheat.config.model import SERVING_MODES, ModelConfig
from preheat.config.module import ModuleConfig
from preheat.config.pt2 import Pt2Config, ShapesConfig
from preheat.config.pt2_forms import TORCH_COMPILE_ARGUMENTS
from preheat.config.text import TextConfig
from preheat.config.yaml_text import read_yaml
from preheat.errors import ConfigError

MODEL_CONFIGS = sorted((Path(__file__).parents[2] / "model-config").glob("*.yaml"))

EVERYTHING = """
minWorkers: 1
maxWorkers: 2
batchSize: 4
maxBatchDelay: 20
responseTimeout: 120
startupTimeout: 1800
maxRetryTimeoutInSec: 7200
deviceType: gpu
deviceIds: [0, 1]
handler: {profile: true, notes: [a]}
pt2:
  compile: {enable: true, backend: inductor, mode: default, dynamic: false,
            options: {epilogue_fusion: true}}
  targets: [unet, vae.decoder]
  scope: regional
  on_failure: fail
  attention: math
  shapes:
    strategy: buckets
    buckets: [[1024, 1024], [1152, 896], [896, 1152]]
    batch_sizes: [4, 1, 2]
    fit: resize
    oversize: eager
  cache: {key: sdxl/v1, shared: /mnt/cache}
  export: {aot_compile: true}
  debug: {recompiles: true, guards: false, graph_breaks: true}
pipeline:
  path: /models/sdxl
  dtype: bfloat16
  scheduler: EulerDiscreteScheduler
  guidance: "on"
  tasks: [text-to-image, inpainting]
  fused_lora: /models/lora
  limits: {max_steps: 50, max_prompt_chars: 500, max_image_bytes: 1000, max_image_pixels: 2000000,
           min_side: 8, max_side: 2048, max_images: 2, max_guidance_scale: 20}
  defaults: {num_inference_steps: 20, guidance_scale: 7, strength: 0.5, output_format: webp}
"""


def parse(text: str) -> ModelConfig:
    return ModelConfig.parse(yaml.safe_load(text))


def test_every_key_arrives() -> None:
    config = parse(EVERYTHING)
    assert (config.minWorkers, config.maxWorkers, config.batchSize, config.maxBatchDelay) == (
        1,
        2,
        4,
        20,
    )
    assert (config.startupTimeout, config.responseTimeout, config.maxRetryTimeoutInSec) == (
        1800,
        120,
        7200,
    )
    assert (config.deviceType, config.deviceIds, config.handler) == (
        "gpu",
        (0, 1),
        {"profile": True, "notes": ["a"]},
    )
    pt2, pipeline = config.pt2, config.section(PipelineConfig)
    assert pt2.compile.enable
    assert pt2.compile.kwargs == {
        "backend": "inductor",
        "mode": "default",
        "dynamic": False,
        "options": {"epilogue_fusion": True},
    }
    assert not pt2.compile.legacy
    assert pt2.compile.warning is None
    assert (pt2.targets, pt2.scope, pt2.on_failure) == (("unet", "vae.decoder"), "regional", "fail")
    assert (pt2.attention, pt2.export.aot_compile) == ("math", True)
    assert pt2.shapes.buckets == (Bucket(1024, 1024), Bucket(1152, 896), Bucket(896, 1152))
    assert pt2.shapes.batch_sizes == (1, 2, 4)
    assert (pt2.shapes.strategy, pt2.shapes.fit, pt2.shapes.oversize) == (
        "buckets",
        "resize",
        "eager",
    )
    assert (pt2.cache.key, pt2.cache.shared) == ("sdxl/v1", "/mnt/cache")
    assert (pt2.debug.recompiles, pt2.debug.guards, pt2.debug.graph_breaks) == (True, False, True)
    assert (pipeline.path, pipeline.dtype, pipeline.scheduler) == (
        "/models/sdxl",
        "bfloat16",
        "EulerDiscreteScheduler",
    )
    assert (pipeline.guidance, pipeline.tasks) == ("on", ("text-to-image", "inpainting"))
    assert pipeline.fused_lora == "/models/lora"
    assert pipeline.limits.max_guidance_scale == 20.0
    assert (pipeline.limits.min_side, pipeline.limits.max_side) == (8, 2048)
    assert pipeline.defaults.output_format == "webp"


def test_an_empty_mapping_is_all_defaults() -> None:
    config = ModelConfig.parse({})
    assert not config.pt2.compile.enable
    assert config.pt2.targets == ()
    assert (
        config.pt2.shapes.strategy,
        config.pt2.shapes.buckets,
        config.pt2.shapes.batch_sizes,
    ) == (
        "buckets",
        (),
        (1,),
    )
    assert (config.pt2.shapes.fit, config.pt2.shapes.oversize) == ("pad", "reject")
    assert (
        config.section(PipelineConfig).path,
        config.section(PipelineConfig).dtype,
        config.section(PipelineConfig).guidance,
    ) == (
        ".",
        "float32",
        "both",
    )
    assert config.section(PipelineConfig).tasks == ("text-to-image", "image-to-image", "inpainting")
    assert config.section(PipelineConfig).limits.max_image_bytes == 10_000_000
    assert config.section(PipelineConfig).defaults.num_inference_steps == 30
    assert config.batchSize == 1


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configs_load_and_compile(path: Path) -> None:
    config = ModelConfig.load(path)
    assert config.pt2.compile.enable
    assert config.pt2.compile.warning is None
    # one static graph per bucket, not one that adapts
    assert config.pt2.compile.kwargs["dynamic"] is False
    assert set(config.pt2.compile.kwargs) <= set(inspect.signature(torch.compile).parameters)
    assert (
        len(config.pt2.shapes.buckets) >= 3
        or (isinstance(config.family, ModuleConfig) and config.family.choices)
        or len(config.section(TextConfig).prefill_buckets) >= 2
    )
    assert config.startupTimeout is not None
    assert config.startupTimeout >= 1800
    # TorchServe's own 300 would end the retries of a slow start
    assert config.maxRetryTimeoutInSec is not None
    if not isinstance(config.family, PipelineConfig):
        return
    largest = max(max(bucket.height, bucket.width) for bucket in config.pt2.shapes.buckets)
    assert largest <= config.section(PipelineConfig).limits.max_side
    if config.pt2.shapes.batch_sizes != "dynamic":
        assert config.batchSize <= max(config.pt2.shapes.batch_sizes)


def test_the_five_configs_are_there() -> None:
    assert {path.stem for path in MODEL_CONFIGS} >= {
        "sdxl",
        "sdxl-turbo",
        "sd15",
        "flux",
        "tiny-sdxl",
    }


def test_flux_buckets_suit_its_patches() -> None:
    [path] = [path for path in MODEL_CONFIGS if path.stem == "flux"]
    for bucket in ModelConfig.load(path).pt2.shapes.buckets:
        assert bucket.height % 16 == bucket.width % 16 == 0


@pytest.mark.parametrize(
    "text", [EVERYTHING, "pt2: {backend: inductor}", "pipeline: {guidance: off}"]
)
def test_parsing_leaves_its_input_alone(text: str) -> None:
    data = yaml.safe_load(text)
    before = copy.deepcopy(data)
    first, second = ModelConfig.parse(data), ModelConfig.parse(data)
    assert data == before
    assert first == second


def test_changing_the_input_later_changes_no_config() -> None:
    data = yaml.safe_load(EVERYTHING)
    config = ModelConfig.parse(data)
    data["pt2"]["compile"]["options"]["epilogue_fusion"] = False
    data["pt2"]["shapes"]["buckets"].clear()
    data["handler"]["notes"].append("b")
    assert config == parse(EVERYTHING)


def sections(config: BaseModel) -> list[BaseModel]:
    below = [value for value in dict(config).values() if isinstance(value, BaseModel)]
    return [config, *(section for child in below for section in sections(child))]


def test_every_section_is_frozen() -> None:
    found = sections(parse(EVERYTHING))
    assert len(found) == 10
    for section in found:
        for name in type(section).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, None)


def test_the_compile_arguments_are_frozen_too() -> None:
    kwargs: Any = parse(EVERYTHING).pt2.compile.kwargs
    changes: list[Callable[[], object]] = [
        lambda: kwargs.update(mode="max-autotune"),
        lambda: kwargs.pop("mode"),
        lambda: kwargs.__setitem__("mode", "max-autotune"),
        lambda: kwargs["options"].clear(),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="frozen"):
            change()


def test_a_config_copies_pickles_and_dumps() -> None:
    config = parse(EVERYTHING)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    dumped = config.model_dump(mode="json")
    assert dumped["pt2"]["shapes"]["buckets"][1] == [1152, 896]
    assert dumped["pt2"]["compile"]["kwargs"]["options"] == {"epilogue_fusion": True}


def test_a_bare_on_or_off_is_what_it_looks_like() -> None:
    assert parse("pipeline: {guidance: on}").section(PipelineConfig).guidance == "on"
    assert parse("pipeline: {guidance: off}").section(PipelineConfig).guidance == "off"


def test_without_guidance_the_default_scale_is_none() -> None:
    assert parse("pipeline: {guidance: off}").section(PipelineConfig).defaults.guidance_scale == 0.0
    assert (
        parse("pipeline: {guidance: off, defaults: {num_inference_steps: 4}}")
        .section(PipelineConfig)
        .defaults.guidance_scale
        == 0.0
    )
    assert (
        parse("pipeline: {guidance: off, defaults: {guidance_scale: 1}}")
        .section(PipelineConfig)
        .defaults.guidance_scale
        == 1.0
    )


def test_fixed_resizes() -> None:
    shapes = parse("pt2: {shapes: {strategy: fixed, buckets: [[512, 512]]}}").pt2.shapes
    assert (shapes.fit, shapes.buckets) == ("resize", (Bucket(512, 512),))
    assert ShapesConfig(strategy="fixed").fit == "resize"


def test_dynamic_batch_sizes() -> None:
    assert parse("pt2: {shapes: {batch_sizes: dynamic}}").pt2.shapes.batch_sizes == "dynamic"


def test_sections_take_our_own_objects() -> None:
    shapes = ShapesConfig(buckets=(Bucket(64, 32),), batch_sizes=(2, 1))
    assert Pt2Config(shapes=shapes).shapes.buckets == (Bucket(64, 32),)
    assert shapes.batch_sizes == (1, 2)
    # unlike an empty `pt2: {}` in a YAML, which TorchServe compiles
    assert not Pt2Config().compile.enable


def test_torch_knows_no_argument_that_the_legacy_form_does_not() -> None:
    assert set(inspect.signature(torch.compile).parameters) - {"model"} <= set(
        TORCH_COMPILE_ARGUMENTS
    )


MODES = [
    ("continuousBatching: true", "continuousBatching", "it is a language model's (text)"),
    ("sequenceBatching: true", "sequenceBatching", "have no memory of each other"),
    ("asyncCommunication: true", "asyncCommunication", "a batch is answered as one"),
    ("parallelType: pp", "parallelType", "for more GPUs, minWorkers"),
    ("parallelType: tp", "parallelType", "for more GPUs, minWorkers"),
    ("torchrun: {nproc-per-node: 2}", "torchrun", "for more GPUs, minWorkers"),
]


@pytest.mark.parametrize("family", ["pipeline", "module"])
@pytest.mark.parametrize(("text", "path", "instead"), MODES, ids=[text for text, _, _ in MODES])
def test_a_contract_that_no_family_keeps_is_refused(
    text: str, path: str, instead: str, family: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"{text}\n{family}: {{}}")
    assert caught.value.path == path
    assert f"is not for a {family}: " in caught.value.message and instead in caught.value.message


def test_a_family_that_keeps_a_contract_may_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVING_MODES, "continuousBatching", "batchSize")
    monkeypatch.setattr(ModuleConfig, "serving_modes", frozenset({"continuousBatching"}))
    assert parse("continuousBatching: true\nmodule: {}").continuousBatching
    with pytest.raises(ConfigError, match="is not for a pipeline: batchSize"):
        parse("continuousBatching: true\npipeline: {}")


def test_a_contract_that_is_not_asked_for_may_be_named() -> None:
    assert (
        parse("continuousBatching: false\nsequenceBatching: false\npipeline: {}").continuousBatching
        is False
    )


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        (
            "batchSize: 4\npt2: {shapes: {batch_sizes: [1, 2]}}",
            "a batch of 4 requests (batchSize) is split into runs of 2",
        ),
        (
            "batchSize: 1\npt2: {shapes: {batch_sizes: [8]}}",
            "filled up to 8 rows, and a batch has 1 requests at most",
        ),
        ("batchSize: 2\npt2: {shapes: {batch_sizes: [1, 4]}}", "only num_images fills runs of 4"),
        (
            "batchSize: 2\nmodule: {}\npt2: {shapes: {batch_sizes: [1, 4]}}",
            "nothing fills runs of 4",
        ),
        (
            "batchSize: 2\npt2: {shapes: {batch_sizes: [1, 4], invariant: true}}",
            "filled up to 4 rows",
        ),
        ("batchSize: 4\npt2: {shapes: {batch_sizes: [1, 4]}}", None),
        ("batchSize: 4\npt2: {shapes: {batch_sizes: [4], invariant: true}}", None),
        ("batchSize: 4\npt2: {shapes: {batch_sizes: dynamic}}", None),
        ("{}", None),
        ("pt2: inductor", "pt2: this form is deprecated"),
        (
            "pt2: {compile: {enable: true, backend: nonsense}}",
            "pt2.compile.backend: 'nonsense' is not a backend",
        ),
        ("startupTimeout: 300", "maxRetryTimeoutInSec: TorchServe's 300 must exceed"),
        ("startupTimeout: 299", None),
        ("startupTimeout: 900\nmaxRetryTimeoutInSec: 901", None),
    ],
)
def test_what_loads_and_is_hardly_meant_is_said(text: str, warned: str | None) -> None:
    warnings = parse(text).warnings
    assert warnings == () if warned is None else len(warnings) == 1 and warned in warnings[0]


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configs_leave_nothing_to_warn_of(path: Path) -> None:
    assert ModelConfig.load(path).warnings == ()


TWICE = [
    ("batchSize: 1\nminWorkers: 1\nbatchSize: 2", "batchSize", "stands twice, in lines 1 and 3"),
    ("pt2:\n  shapes: {}\n  shapes: {fit: pad}", "pt2.shapes", "stands twice, in lines 2 and 3"),
    (
        "pipeline: {dtype: float32, dtype: float16}",
        "pipeline.dtype",
        "stands twice, in lines 1 and 1",
    ),
    ("handler: {a: [{b: 1}, {c: 1, c: 1}]}", "handler.a[1].c", "stands twice"),
    ("handler: {on: 1, true: 2}", "handler.true", "stands twice"),  # one key to YAML 1.1
]


@pytest.mark.parametrize(
    ("text", "path", "message"), TWICE, ids=[text.replace("\n", ", ") for text, _, _ in TWICE]
)
def test_a_key_that_stands_twice_is_refused(
    text: str, path: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.load(file)
    assert caught.value.path == path and message in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "handler: {a: &x {b: 1}, c: *x, d: *x}",
        "handler: {a: &x {b: 1}, c: {<<: *x, b: 2}}",  # what is merged may be overridden
        "handler: {a: {b: 1}, c: {b: 1}}",
        "handler: {1: a, '1': b}",
    ],
)
def test_what_only_looks_like_a_second_time_loads(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(text)
    assert read_yaml(file) == yaml.safe_load(text)


def test_a_file_whose_anchors_refer_to_themselves_ends(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("handler: &x {a: *x}")
    assert list(read_yaml(file)) == ["handler"]


BAD = [
    # Unknown keys: at each level, with the closest known one.
    ("bacthSize: 4", "bacthSize", "unknown key; did you mean batchSize?"),
    ("minworkers: 4", "minworkers", "unknown key; did you mean minWorkers?"),
    ("zzz: 4", "zzz", "unknown key; known here: minWorkers, maxWorkers,"),
    ("true: 4", "1", "every key must be text, got true"),
    ("pt2: {shape: {fit: pad}}", "pt2.shape", "unknown key; did you mean shapes?"),
    (
        "pt2: {compile: {enable: true}, target: [unet]}",
        "pt2.target",
        "unknown key; did you mean targets?",
    ),
    ("pt2: {shapes: {bucket: []}}", "pt2.shapes.bucket", "unknown key; did you mean buckets?"),
    ("pt2: {cache: {keys: a}}", "pt2.cache.keys", "unknown key; did you mean key?"),
    ("pt2: {export: {aot: true}}", "pt2.export.aot", "unknown key; known here: aot_compile"),
    (
        "pipeline: {limits: {max_step: 3}}",
        "pipeline.limits.max_step",
        "unknown key; did you mean max_steps?",
    ),
    # Buckets.
    (
        "pt2: {shapes: {buckets: [[1024, 1024], [1001, 896]]}}",
        "pt2.shapes.buckets[1][0]",
        "1001 is not a multiple of 8; use 1000 or 1008",
    ),
    (
        "pt2: {shapes: {buckets: [[512, 4]]}}",
        "pt2.shapes.buckets[0][1]",
        "4 is not a multiple of 8; use 8",
    ),
    (
        "pt2: {shapes: {buckets: [[512, -8]]}}",
        "pt2.shapes.buckets[0][1]",
        "must be greater than 0, got -8",
    ),
    (
        "pt2: {shapes: {buckets: [[512, 0]]}}",
        "pt2.shapes.buckets[0][1]",
        "must be greater than 0, got 0",
    ),
    (
        "pt2: {shapes: {buckets: [[512, '512']]}}",
        "pt2.shapes.buckets[0][1]",
        "must be a whole number, got '512'",
    ),
    (
        "pt2: {shapes: {buckets: [[512, 512.0]]}}",
        "pt2.shapes.buckets[0][1]",
        "must be a whole number, got 512.0",
    ),
    (
        "pt2: {shapes: {buckets: [1024, 1024]}}",
        "pt2.shapes.buckets[0]",
        "a bucket, [height, width] in pixels, got 1024",
    ),
    (
        "pt2: {shapes: {buckets: [[8, 8, 8]]}}",
        "pt2.shapes.buckets[0]",
        "a bucket, [height, width] in pixels",
    ),
    (
        "pt2: {shapes: {buckets: [64x64]}}",
        "pt2.shapes.buckets[0]",
        "a bucket, [height, width] in pixels, got '64x64'",
    ),
    ("pt2: {shapes: {buckets: 1024}}", "pt2.shapes.buckets", "must be a list, got 1024"),
    (
        "pt2: {shapes: {buckets: [[8, 8], [16, 8], [8, 8]]}}",
        "pt2.shapes.buckets[2]",
        "8x8 is listed twice",
    ),
    # Batch sizes.
    (
        "pt2: {shapes: {batch_sizes: [1, 0]}}",
        "pt2.shapes.batch_sizes[1]",
        "must be greater than 0, got 0",
    ),
    (
        "pt2: {shapes: {batch_sizes: [1, true]}}",
        "pt2.shapes.batch_sizes[1]",
        "must be a whole number, got true",
    ),
    (
        "pt2: {shapes: {batch_sizes: []}}",
        "pt2.shapes.batch_sizes",
        "must have at least one entry, got []",
    ),
    ("pt2: {shapes: {batch_sizes: [2, 2]}}", "pt2.shapes.batch_sizes[1]", "2 is listed twice"),
    (
        "pt2: {shapes: {batch_sizes: dinamic}}",
        "pt2.shapes.batch_sizes",
        "a list of batch sizes or dynamic, got 'dinamic'",
    ),
    (
        "pt2: {shapes: {batch_sizes: 4}}",
        "pt2.shapes.batch_sizes",
        "a list of batch sizes or dynamic, got 4",
    ),
    # Words and forms.
    (
        "pt2: {shapes: {fit: crop}}",
        "pt2.shapes.fit",
        "must be 'pad', 'resize' or 'mask', got 'crop'",
    ),
    ("pt2: {shapes: {strategy: any}}", "pt2.shapes.strategy", "got 'any'"),
    ("pt2: {shapes: {strategy: fixed, fit: pad}}", "pt2.shapes.fit", "use fit: resize"),
    (
        "pt2: {shapes: {strategy: fixed, buckets: [[8, 8], [16, 8]]}}",
        "pt2.shapes.buckets",
        "2 buckets are listed; keep one",
    ),
    (
        "pt2: {targets: [vae]}",
        "pt2.targets[0]",
        "must be 'unet', 'transformer', 'vae.decoder' or 'vae.encoder', got 'vae'",
    ),
    ("pt2: {targets: unet}", "pt2.targets", "must be a list, got 'unet'"),
    ("pt2: {targets: [unet, unet]}", "pt2.targets[1]", "unet is listed twice"),
    ("pt2: {scope: whole}", "pt2.scope", "must be 'full' or 'regional', got 'whole'"),
    ("pt2: {on_failure: true}", "pt2.on_failure", "must be 'eager' or 'fail', got true"),
    ("pt2: {shapes: }", "pt2.shapes", "must be a mapping (key: value), got nothing"),
    (
        "pt2: {compile: {enable: true, options: {freezing: true}}, export: {aot_compile: true}}",
        "pt2.compile.options.freezing",
        "packages compiled ahead of time hold none; leave it out",
    ),
    (
        "pt2: {attention: flash, shapes: {fit: mask}}",
        "pt2.attention",
        "flash takes no mask",
    ),
    ("pt2: {export: {aot_compile: 1}}", "pt2.export.aot_compile", "must be true or false, got 1"),
    ("pt2: {debug: {guards: 'yes'}}", "pt2.debug.guards", "must be true or false, got 'yes'"),
    ("pt2: {cache: {key: ''}}", "pt2.cache.key", "must not be empty, got ''"),
    ("pt2: {compile: {enabled: true}}", "pt2.compile.enable", "is missing; use true or false"),
    (
        "pt2: {compile: true}",
        "pt2.compile",
        "must be a mapping such as {enable: true, backend: inductor}, got true",
    ),
    (
        "pt2: {compile: {enable: true, 3: 4}}",
        "pt2.compile.3",
        "must be the name of an argument of torch.compile",
    ),
    (
        "pt2: {compile: {enable: true}, backend: eager}",
        "pt2.backend",
        "it belongs under pt2.compile",
    ),
    ("pt2: {shapes: {}, mode: default}", "pt2.mode", "it belongs under pt2.compile"),
    ("pt2: compile", "pt2", "to compile, use pt2: {compile: {enable: true}}"),
    ("pt2:", "pt2", "must be a mapping or the name of a torch.compile backend, got nothing"),
    (
        "pt2: [compile]",
        "pt2",
        "must be a mapping or the name of a torch.compile backend, got ['compile']",
    ),
    # TorchServe's keys: what it would ignore with a log line.
    ("batchSize: 0", "batchSize", "must be greater than 0, got 0"),
    ("batchSize: '4'", "batchSize", "must be a whole number, got '4'"),
    ("maxBatchDelay: -1", "maxBatchDelay", "must be at least 0, got -1"),
    ("deviceType: cuda", "deviceType", "must be 'cpu' or 'gpu', got 'cuda'"),
    ("deviceIds: [0, x]", "deviceIds[1]", "must be a whole number, got 'x'"),
    ("torchrun: 2", "torchrun", "must be a mapping (key: value), got 2"),
    ("minWorkers: 2\nmaxWorkers: 1", "minWorkers", "2 is over maxWorkers (1)"),
    (
        "startupTimeout: 600\nmaxRetryTimeoutInSec: 600",
        "maxRetryTimeoutInSec",
        "600 must exceed startupTimeout (600)",
    ),
    # The cache.
    ("pt2: {cache: {shared: cache}}", "pt2.cache.shared", "'cache' is relative"),
    (
        "pt2: {cache: {trust: everybody}}",
        "pt2.cache.trust",
        "must be 'signed' or 'owner', got 'everybody'",
    ),
    ("pt2: {cache: {max_bytes: 0}}", "pt2.cache.max_bytes", "must be greater than 0, got 0"),
    # The pipeline.
    (
        "pipeline: {dtype: fp16}",
        "pipeline.dtype",
        "must be 'float32', 'float16' or 'bfloat16', got 'fp16'",
    ),
    ("pipeline: {path: ''}", "pipeline.path", "must not be empty"),
    ("pipeline: {tasks: []}", "pipeline.tasks", "must have at least one entry"),
    ("pipeline: {tasks: [inpainting, inpaint]}", "pipeline.tasks[1]", "got 'inpaint'"),
    (
        "pipeline: {tasks: [inpainting, inpainting]}",
        "pipeline.tasks[1]",
        "inpainting is listed twice",
    ),
    (
        "pipeline: {guidance: maybe}",
        "pipeline.guidance",
        "must be 'both', 'on' or 'off', got 'maybe'",
    ),
    (
        "pipeline: {guidance: off, defaults: {guidance_scale: 3}}",
        "pipeline.defaults.guidance_scale",
        "3.0 contradicts pipeline.guidance: off; use 0.0",
    ),
    (
        "pipeline: {guidance: on, defaults: {guidance_scale: 1}}",
        "pipeline.defaults.guidance_scale",
        "1.0 contradicts pipeline.guidance: on; use a scale above 1",
    ),
    (
        "pipeline: {defaults: {guidance_scale: .nan}}",
        "pipeline.defaults.guidance_scale",
        "must be a finite number, got nan",
    ),
    (
        "pipeline: {defaults: {guidance_scale: 60}}",
        "pipeline.defaults.guidance_scale",
        "pipeline.limits.max_guidance_scale",
    ),
    ("pipeline: {defaults: {strength: 0}}", "pipeline.defaults.strength", "must be greater than 0"),
    ("pipeline: {defaults: {strength: 1.5}}", "pipeline.defaults.strength", "must be at most 1"),
    (
        "pipeline: {limits: {max_steps: 10}}",
        "pipeline.defaults.num_inference_steps",
        "30 is over pipeline.limits.max_steps",
    ),
    (
        "pipeline: {limits: {max_cost: 0}}",
        "pipeline.limits.max_cost",
        "must be greater than 0, got 0",
    ),
    (
        "pipeline: {grpc_streaming: maybe}",
        "pipeline.grpc_streaming",
        "must be true or false, got 'maybe'",
    ),
    (
        "pipeline: {limits: {max_images: 0}}",
        "pipeline.limits.max_images",
        "must be greater than 0, got 0",
    ),
    (
        "pipeline: {limits: {min_side: 64, max_side: 32}}",
        "pipeline.limits.min_side",
        "64 is over max_side (32)",
    ),
    # The document.
    ("", "", "a model YAML is a mapping of keys to values, got nothing"),
    ("[1, 2]", "", "a model YAML is a mapping of keys to values, got [1, 2]"),
]


@pytest.mark.parametrize(
    ("text", "path", "message"), BAD, ids=[text.replace("\n", ", ") for text, _, _ in BAD]
)
def test_an_error_names_the_path_the_value_and_what_would_be_right(
    text: str, path: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.path == path
    assert message in caught.value.message
    assert str(caught.value) == (
        f"{path}: {caught.value.message}" if path else caught.value.message
    )


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse({"pipeline": {"dtype": "x" * 10_000}})
    assert len(str(caught.value)) < 200


def test_loading_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml: No such file"):
        ModelConfig.load(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    for content in (b"pt2: {shapes: ", b"a: b: c", b"\xff\xfe\xff", b"\x00"):
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
            ModelConfig.load(broken)
