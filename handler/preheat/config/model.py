"""The model YAML as frozen objects.

TorchServe's keys keep their meaning, `pt2.compile` in every form it knows (pt2_forms); ours stand
beside them. An unknown key or a wrong value is a ConfigError that names the YAML path, the value
and what would be right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from preheat.config.module import ModuleConfig
from preheat.config.pt2_forms import CompileConfig, normalized
from preheat.config.schema import (
    BatchSizes,
    BucketPair,
    Count,
    FrozenMapping,
    Listed,
    Positive,
    Section,
    Text,
)
from preheat.config.yaml_errors import explained, keys_of, refuse_twice, shown
from preheat.config.yaml_text import read_yaml
from preheat.errors import ConfigError

TrustMode = Literal["signed", "owner"]

__all__ = [
    "Attention",
    "CacheConfig",
    "CompileConfig",
    "DebugConfig",
    "DefaultsConfig",
    "Dtype",
    "ExportConfig",
    "Fit",
    "Guidance",
    "LimitsConfig",
    "ModelConfig",
    "ModuleConfig",
    "OnFailure",
    "OutputFormat",
    "Oversize",
    "PipelineConfig",
    "Pt2Config",
    "Scope",
    "ShapesConfig",
    "Strategy",
    "Target",
    "Task",
]

Fit = Literal["pad", "resize"]
Oversize = Literal["reject", "downscale", "eager"]
Strategy = Literal["buckets", "dynamic", "fixed", "exact"]
Scope = Literal["full", "regional"]
OnFailure = Literal["eager", "fail"]
Target = Literal["unet", "transformer", "vae.decoder", "vae.encoder"]
Attention = Literal["default", "math", "flash", "efficient", "cudnn"]
Dtype = Literal["float32", "float16", "bfloat16"]
Task = Literal["text-to-image", "image-to-image", "inpainting"]
Guidance = Literal["both", "on", "off"]
LongPrompts = Literal["cut", "reject"]
OutputFormat = Literal["png", "jpeg", "webp"]


class ShapesConfig(Section):
    """Which sizes are warmed and how a request meets them."""

    strategy: Strategy = "buckets"
    """`buckets`: every size below is compiled and warmed. `dynamic`: one graph for all sizes.
    `fixed`: one size, everything is resampled. `exact`: plain torch.compile, which compiles inside
    requests; to compare with."""
    buckets: Listed[BucketPair] = ()
    """`[height, width]` in pixels, multiples of 8 (16 for Flux and SD3). Empty: the one default
    size of the pipeline."""
    batch_sizes: BatchSizes = (1,)
    """Rows that are compiled for; a batch is filled up to the next one. `dynamic`: one graph per
    bucket for all of them, and one for a single row."""
    fit: Fit = "pad"
    """How a picture meets its bucket. `pad`: the smallest bucket that covers it, and the asked size
    is cut out. `resize`: the bucket of nearest shape, resampled to the asked size. See fit.md."""
    oversize: Oversize = "reject"
    """What no bucket covers. `reject`: a 400. `downscale`: the bucket of nearest shape, enlarged.
    `eager`: as it is, uncompiled."""
    invariant: bool = False
    """Always run the one largest batch size, so that an answer is the same to the last bit whatever
    other requests share its batch."""

    @model_validator(mode="before")
    @classmethod
    def _fixed_means_resize(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("strategy") == "fixed":
            return {"fit": "resize", **data}
        return data

    @field_validator("batch_sizes")
    @classmethod
    def _ascending(
        cls, sizes: tuple[int, ...] | Literal["dynamic"]
    ) -> tuple[int, ...] | Literal["dynamic"]:
        if sizes == "dynamic":
            return sizes
        refuse_twice(sizes, "pt2.shapes.batch_sizes")
        return tuple(sorted(sizes))

    @model_validator(mode="after")
    def _agree(self) -> ShapesConfig:
        refuse_twice(self.buckets, "pt2.shapes.buckets")
        if self.strategy == "fixed" and len(self.buckets) > 1:
            raise ConfigError(
                f"strategy fixed paints one size, but {len(self.buckets)} buckets are listed; "
                "keep one, or use strategy: buckets",
                "pt2.shapes.buckets",
            )
        if self.strategy == "fixed" and self.fit == "pad":
            raise ConfigError(
                "strategy fixed resizes every picture; use fit: resize, or leave it out",
                "pt2.shapes.fit",
            )
        return self


class CacheConfig(Section):
    """Where compiled artifacts are kept between runs and machines."""

    key: Text | None = None
    """Name of what is cached, such as `sdxl/v1`. Raise it to start afresh."""
    shared: Text | None = None
    """A folder that workers share, on this machine or a network. `trust` decides which of its files
    are believed."""
    trust: TrustMode | None = None
    """`signed`: bundles carry an HMAC made with the key in PREHEAT_CACHE_KEY_FILE or
    PREHEAT_CACHE_KEY. `owner`: bundles and their folder belong to the worker's uid and are not
    group- or world-writable. Default: signed where there is a key."""
    max_bytes: Positive = 10_000_000_000
    """Bytes of all bundles in `shared`; past it those unused for longest go."""

    @field_validator("shared")
    @classmethod
    def _absolute(cls, shared: str | None) -> str | None:
        if shared is not None and not Path(shared).is_absolute():
            raise ConfigError(
                f"{shared!r} is relative, and TorchServe starts workers in a folder of its own; "
                "use an absolute path",
                "pt2.cache.shared",
            )
        return shared


class ExportConfig(Section):
    """TorchServe's `pt2.export`."""

    aot_compile: bool = False
    """Compile when the archive is built, and run what was compiled then; see `preheat archive
    --aot`."""


class DebugConfig(Section):
    """What torch tells about compiling: log artifacts as TORCH_LOGS names them, and files as
    TORCH_COMPILE_DEBUG writes them.
    """

    recompiles: bool = False
    """Log why torch compiles again."""
    guards: bool = False
    """Log every guard of a graph; long."""
    graph_breaks: bool = False
    """Log where a graph breaks, and why."""
    trace_dir: Text | None = None
    """Folder for Inductor's graphs and generated code, a subfolder per process."""
    trace_bytes: Positive = 500_000_000
    """Bytes that `trace_dir` may hold after a start; the oldest files go first."""


class Pt2Config(Section):
    """The `pt2` section: TorchServe's `compile` and `export`, and our keys beside them."""

    compile: CompileConfig = CompileConfig()
    """TorchServe's: whether to compile, and the arguments of torch.compile."""
    targets: Listed[Text] = ()
    """Modules to compile; empty means the denoiser, or the whole of a `module`."""
    imports: Listed[Text] = Field(default=(), alias="import")
    """Python files of the archive that are loaded before the model: they register
    `torch.library.custom_op`s."""
    scope: Scope = "full"
    """`full`: the whole target is one graph. `regional`: diffusers' repeated blocks alone, quicker
    to compile."""
    on_failure: OnFailure = "eager"
    """Of a bucket that does not compile. `eager`: it is served eagerly, and log, state and metrics
    say so. `fail`: the worker never gets READY."""
    attention: Attention = "default"
    """Backend of scaled_dot_product_attention, in warm-up and serving alike; `default`: torch
    chooses."""
    shapes: ShapesConfig = ShapesConfig()
    """Which sizes are warmed."""
    cache: CacheConfig = CacheConfig()
    """Compiled code that workers share."""
    export: ExportConfig = ExportConfig()
    """TorchServe's: packages compiled ahead of time."""
    debug: DebugConfig = DebugConfig()
    """What torch tells about compiling."""

    @property
    def openvino(self) -> bool:
        """Whether targets become OpenVINO models."""
        return self.compile.enable and self.compile.kwargs.get("backend") == "openvino"

    @model_validator(mode="after")
    def _openvino_exports(self) -> Pt2Config:
        """Refuse what means nothing for a graph that torch.export made and OpenVINO runs."""
        reasons = {
            "pt2.shapes.strategy": self.shapes.strategy in ("dynamic", "exact")
            and f"strategy {self.shapes.strategy} has no list of shapes to make OpenVINO models "
            "for; use buckets or fixed",
            "pt2.scope": self.scope == "regional"
            and "OpenVINO takes whole targets; use scope: full",
            "pt2.attention": self.attention != "default"
            and "OpenVINO has an attention of its own; leave it out",
            "pt2.export.aot_compile": self.export.aot_compile
            and "packages are Inductor's; use backend: inductor",
        }
        for path, reason in reasons.items():
            if self.openvino and reason:
                raise ConfigError(reason, path)
        return self

    @model_validator(mode="after")
    def _export_needs_buckets(self) -> Pt2Config:
        if self.export.aot_compile and self.shapes.strategy in ("dynamic", "exact"):
            raise ConfigError(
                f"strategy {self.shapes.strategy} has no list of shapes to compile ahead of time; "
                "use buckets or fixed",
                "pt2.export.aot_compile",
            )
        if self.export.aot_compile and (self.compile.kwargs.get("options") or {}).get("freezing"):
            raise ConfigError(
                "freezes weights into the code, and packages compiled ahead of time hold none; "
                "leave it out",
                "pt2.compile.options.freezing",
            )
        return self

    @field_validator("targets")
    @classmethod
    def _unique(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        refuse_twice(targets, "pt2.targets")
        return targets

    @field_validator("imports")
    @classmethod
    def _inside_the_archive(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        refuse_twice(files, "pt2.import")
        for index, name in enumerate(files):
            path = PurePosixPath(name)
            if (
                path.is_absolute()
                or ".." in path.parts
                or path.suffix != ".py"
                or not path.stem.isidentifier()
            ):
                raise ConfigError(
                    f"{name!r} is no Python file of the archive; use a relative path such as "
                    "my_ops.py",
                    f"pt2.import[{index}]",
                )
        return files


class LimitsConfig(Section):
    """What a request may ask for; everything past it is a 400."""

    max_steps: Positive = 100
    """Denoising steps of a request."""
    max_prompt_chars: Positive = 2_000
    """Characters of a prompt, and of a negative prompt."""
    long_prompts: LongPrompts = "cut"
    """What becomes of a prompt that no text encoder reads to its end: `cut` says in the answer how
    many tokens were dropped.
    """
    max_image_bytes: Positive = 10_000_000
    """Bytes of an input image as sent, after base64 is undone."""
    max_image_pixels: Positive = 16_777_216
    """Pixels of an input image, once decoded."""
    min_side: Positive = 16
    """Pixels: least height and width of the picture asked for."""
    max_side: Annotated[int, Field(gt=0, le=16_383)] = 4_096
    """Pixels: greatest height and width of the picture asked for."""
    max_images: Positive = 4
    """Pictures of one request (`num_images`)."""
    max_guidance_scale: Annotated[float, Field(gt=0)] = 50.0
    """Greatest `guidance_scale`."""
    max_cost: Positive | None = None
    """Pixel-steps: the bucket's pixels x denoiser calls x pictures of one request. 100 million is
    1024x1024 in 95 steps. Default: no limit."""

    @model_validator(mode="after")
    def _agree(self) -> LimitsConfig:
        if self.min_side > self.max_side:
            raise ConfigError(
                f"{self.min_side} is over max_side ({self.max_side})", "pipeline.limits.min_side"
            )
        return self


class DefaultsConfig(Section):
    """What a request gets that does not say."""

    num_inference_steps: Positive = 30
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    """How closely to follow the prompt. Above 1 the denoiser runs twice per step, with and without
    it."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Image-to-image: share of the steps that run, 0 to 1; 1 keeps nothing of the image."""
    output_format: OutputFormat = "png"
    """Of the pictures."""


class PipelineConfig(Section):
    """Which pipeline is served and what its clients may ask."""

    path: Text = "."
    """A diffusers folder, or a hub id, or `tiny:sdxl`; `.` is the archive's own. See operations.md.
    """
    dtype: Dtype = "float32"
    """Of weights and computation.
    In float16 SDXL's VAE, which overflows in it, stays float32."""
    scheduler: Text | None = None
    """Name of a diffusers scheduler class that replaces the folder's own."""
    guidance: Guidance = "both"
    """Which variants are warmed: with guidance (`on`), without (`off`) or both; a request for the
    other one is a 400."""
    tasks: Annotated[Listed[Task], Field(min_length=1)] = (
        "text-to-image",
        "image-to-image",
        "inpainting",
    )
    """What a request may ask; one for another is a 400."""
    fused_lora: Text | None = None
    """Folder of a safetensors LoRA that is fused before compiling."""
    limits: LimitsConfig = LimitsConfig()
    """What a request may ask for."""
    defaults: DefaultsConfig = DefaultsConfig()
    """What a request gets that does not say."""
    grpc_streaming: bool = False
    """Send a stream's events over gRPC while they happen, each in a message. TorchServe 0.12 does
    not tell a handler whether StreamPredictions or Predictions was called, and a second message to
    the latter ends the worker: only for clients who can be trusted to ask for `stream` in
    StreamPredictions alone. Otherwise all events come in one message at the end, to either."""

    @model_validator(mode="before")
    @classmethod
    def _guidance_words(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if isinstance(data.get("guidance"), bool):  # YAML 1.1 reads a bare on or off as a boolean
            data["guidance"] = "on" if data["guidance"] else "off"
        defaults = data.get("defaults", {})
        if data.get("guidance") == "off" and isinstance(defaults, Mapping):
            data["defaults"] = {"guidance_scale": 0.0, **defaults}
        return data

    @model_validator(mode="after")
    def _agree(self) -> PipelineConfig:
        refuse_twice(self.tasks, "pipeline.tasks")
        steps, scale = self.defaults.num_inference_steps, self.defaults.guidance_scale
        if steps > self.limits.max_steps:
            raise ConfigError(
                f"{steps} is over pipeline.limits.max_steps ({self.limits.max_steps})",
                "pipeline.defaults.num_inference_steps",
            )
        if scale > self.limits.max_guidance_scale:
            raise ConfigError(
                f"{scale} is over pipeline.limits.max_guidance_scale "
                f"({self.limits.max_guidance_scale})",
                "pipeline.defaults.guidance_scale",
            )
        if self.guidance != "both" and (scale > 1) != (self.guidance == "on"):
            right = "a scale above 1" if self.guidance == "on" else "0.0"
            raise ConfigError(
                f"{scale} contradicts pipeline.guidance: {self.guidance}; use {right}",
                "pipeline.defaults.guidance_scale",
            )
        return self


Family = Literal["pipeline", "module"]
"""What is served, by its section of the YAML."""

SERVING_MODES: dict[str, tuple[frozenset[Family], str]] = {
    "continuousBatching": (
        frozenset(),
        "it will be a language model's; batchSize and maxBatchDelay make batches here",
    ),
    "sequenceBatching": (frozenset(), "requests here have no memory of each other; leave it out"),
    "asyncCommunication": (
        frozenset(),
        "a batch is answered as one here; batchSize and maxBatchDelay make batches",
    ),
    "parallelType": (
        frozenset(),
        "each worker holds the whole model on one GPU; for more GPUs, minWorkers",
    ),
    "torchrun": (frozenset(), "each worker is one process on one GPU; for more GPUs, minWorkers"),
}
"""TorchServe's other contracts with a handler, by key: the families that keep it, and what the
others have instead.
"""


class ModelConfig(Section):
    """A whole model YAML.

    The camelCase keys are TorchServe's: the 23 that its frontend reads
    (frontend/archive/src/main/java/org/pytorch/serve/archive/model/ModelConfig.java of 0.12.0), of
    which it ignores wrong values with a log line, and `handler`, where BaseHandler looks for
    `profile` (ts/handler_utils/timer.py).
    """

    minWorkers: Count | None = None
    """Worker processes at start; each holds the model once. Say `maxWorkers` too; without them
    TorchServe starts one for each GPU, or core."""
    maxWorkers: Count | None = None
    """Most that the model may be scaled to."""
    batchSize: Positive = 1
    """Most requests that a worker gets at once."""
    maxBatchDelay: Count | None = None
    """Milliseconds that a request waits for others; a lone one always waits as long."""
    responseTimeout: Positive | None = None
    """Seconds a batch may take; TorchServe's default is 120."""
    startupTimeout: Positive | None = None
    """Seconds that import and initialize() may take, compiling included; TorchServe's default is
    120."""
    maxRetryTimeoutInSec: Positive | None = None
    """Seconds in which a worker that dies or fails to start is started again; must exceed
    startupTimeout. TorchServe's default is 300."""
    deviceType: Literal["cpu", "gpu"] | None = None
    """Where workers run; `gpu` insists on one. Default: a GPU where there is one."""
    deviceIds: Listed[Count] | None = None
    """Numbers of the GPUs that are dealt out to workers. Default: all."""
    parallelType: Literal["pp", "tp", "pptp", "custom"] | None = None
    """One model over several GPUs: refused, each worker holds the whole model on one."""
    parallelLevel: Positive | None = None
    """Processes a worker; with `parallelType`."""
    torchrun: FrozenMapping | None = None
    """Arguments of torchrun: refused, each worker is one process."""
    clientTimeoutInMills: Count | None = None
    """Milliseconds a client waits; what queued longer is dropped. 0, TorchServe's default: for
    ever."""
    jobQueueSize: Positive | None = None
    """Requests that may wait; one more is a 503. Default: `job_queue_size` of config.properties,
    100."""
    useJobTicket: bool | None = None
    """Refuse with a 503 what no idle worker can take at once, rather than queue it."""
    continuousBatching: bool | None = None
    """TorchServe's mode for language models: refused, batchSize makes batches here."""
    sequenceBatching: bool | None = None
    """TorchServe's mode for stateful models: refused, requests have no memory of each other."""
    sequenceMaxIdleMSec: Positive | None = None
    """Milliseconds; with `sequenceBatching`."""
    sequenceTimeoutMSec: Positive | None = None
    """Milliseconds; with `sequenceBatching`."""
    maxNumSequence: Positive | None = None
    """Sequences at a time; with `sequenceBatching`."""
    maxSequenceJobQueueSize: Positive | None = None
    """Requests of a sequence that may wait; with `sequenceBatching`."""
    asyncCommunication: bool | None = None
    """TorchServe's mode for asynchronous handlers: refused, a batch is answered as one."""
    useVenv: bool | None = None
    """Run workers in an environment of their own, made from the archive's requirements."""
    handler: FrozenMapping | None = None
    """Where TorchServe's BaseHandler looks for `profile`."""

    pt2: Pt2Config = Pt2Config()
    """How the model is compiled and which sizes are warmed."""
    pipeline: PipelineConfig = PipelineConfig()
    """A diffusers pipeline."""
    module: ModuleConfig | None = None
    """Any other nn.Module, instead of `pipeline`."""

    @property
    def names_a_family(self) -> bool:
        """Whether the YAML says what is served; if not, the archive's manifest may, as with
        BaseHandler.
        """
        return names_a_family(self.model_fields_set)

    @property
    def family(self) -> Family:
        return "pipeline" if self.module is None else "module"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What loads, and is hardly meant; each begins with its YAML path."""
        legacy = (
            "pt2: this form is deprecated by TorchServe; use pt2: {compile: {enable: true, ...}}"
        )
        said = (
            self.pt2.compile.warning,
            legacy if self.pt2.compile.legacy else None,
            *self._odd_batches(),
        )
        return tuple(filter(None, said))

    def _odd_batches(self) -> Iterator[str]:
        """Where `batch_sizes`, the rows of a run, and `batchSize`, the requests that come together,
        do not go together.
        """
        shapes, most = self.pt2.shapes, self.batchSize
        if shapes.batch_sizes == "dynamic":
            return
        sizes = (max(shapes.batch_sizes),) if shapes.invariant else shapes.batch_sizes
        path = "pt2.shapes.batch_sizes"
        if max(sizes) < most:
            yield (
                f"{path}: a batch of {most} requests (batchSize) is split into runs of {max(sizes)}"
            )
        if min(sizes) > most:
            yield (
                f"{path}: every run is filled up to {min(sizes)} rows, and a batch has {most} "
                "requests at most (batchSize)"
            )
        elif max(sizes) > most:
            filled = "only num_images fills" if self.family == "pipeline" else "nothing fills"
            yield (
                f"{path}: {filled} runs of {max(sizes)}, since batches are of {most} requests at "
                "most (batchSize)"
            )

    def as_module(self) -> ModelConfig:
        """This config for a module of which it says nothing."""
        return self.model_copy(update={"module": self.module or ModuleConfig()})

    @model_validator(mode="after")
    def _one_family(self) -> ModelConfig:
        if self.module is None:
            for index, target in enumerate(self.pt2.targets):
                if target not in get_args(Target):
                    *most, last = map(repr, get_args(Target))
                    raise ConfigError(
                        f"must be {', '.join(most)} or {last}, got {shown(target)}",
                        f"pt2.targets[{index}]",
                    )
            return self
        if "pipeline" in self.model_fields_set:
            raise ConfigError("stands beside pipeline; a YAML has one of the two", "module")
        shapes = self.pt2.shapes
        if shapes.buckets:
            raise ConfigError(
                "a module's buckets are sizes of its inputs: module.inputs", "pt2.shapes.buckets"
            )
        if shapes.strategy not in ("buckets", "exact"):
            raise ConfigError(
                f"{shapes.strategy} is for pipelines; a module has buckets or exact",
                "pt2.shapes.strategy",
            )
        if shapes.fit != "pad":
            raise ConfigError(
                f"{shapes.fit} is for pipelines; a module's inputs are padded", "pt2.shapes.fit"
            )
        if shapes.oversize == "downscale":
            raise ConfigError(
                "downscale is for pipelines; use reject or eager", "pt2.shapes.oversize"
            )
        if self.pt2.export.aot_compile and not self.module.inputs:
            raise ConfigError(
                "has no shapes to compile ahead of time; declare module.inputs",
                "pt2.export.aot_compile",
            )
        return self

    @model_validator(mode="after")
    def _serve_as_asked(self) -> ModelConfig:
        for key, (families, instead) in SERVING_MODES.items():
            if getattr(self, key) and self.family not in families:
                raise ConfigError(f"is not for a {self.family}: {instead}", key)
        return self

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        if (
            self.minWorkers is not None
            and self.maxWorkers is not None
            and self.minWorkers > self.maxWorkers
        ):
            raise ConfigError(
                f"{self.minWorkers} is over maxWorkers ({self.maxWorkers})", "minWorkers"
            )
        if (
            self.startupTimeout
            and self.maxRetryTimeoutInSec
            and self.maxRetryTimeoutInSec <= self.startupTimeout
        ):
            raise ConfigError(
                f"{self.maxRetryTimeoutInSec} must exceed startupTimeout ({self.startupTimeout}), "
                "or TorchServe gives up on a slow start after too few tries",
                "maxRetryTimeoutInSec",
            )
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, ours: bool = False) -> ModelConfig:
        """The config a parsed YAML means. `data` is left as it is (TorchServe's own reading deletes
        from it).

        Args:
            ours: read it as a YAML that names what it serves, even if it does not; see
                `pt2_forms.normalized`.

        Raises:
            ConfigError: an unknown key or a wrong value, with its YAML path.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a model YAML is a mapping of keys to values, got {shown(data)}")
        if "pt2" in data:
            ours = ours or names_a_family(data)
            data = {**data, "pt2": normalized(data["pt2"], keys_of(Pt2Config), ours=ours)}
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise explained(error, data, cls) from None

    @classmethod
    def load(cls, path: Path, *, ours: bool = False) -> ModelConfig:
        """The config in the YAML file at `path`; see `parse`.

        Raises:
            ConfigError: the file cannot be read, is no YAML, or holds an unknown key, one key
                twice, or a wrong value.
        """
        return cls.parse(read_yaml(path), ours=ours)


def names_a_family(data: Collection[str]) -> bool:
    """Whether these keys of a YAML say what is served; if none does, the YAML may be TorchServe's
    own.
    """
    return "pipeline" in data or "module" in data
