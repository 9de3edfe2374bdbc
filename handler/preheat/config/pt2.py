"""The YAML's `pt2` section: how the model is compiled, which sizes are warmed, and where compiled
code is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from preheat.config.pt2_forms import CompileConfig
from preheat.config.schema import BatchSizes, BucketPair, Listed, Positive, Section, Text
from preheat.config.yaml_errors import refuse_twice
from preheat.errors import ConfigError

TrustMode = Literal["signed", "owner"]
Fit = Literal["pad", "resize", "mask"]
Oversize = Literal["reject", "downscale", "eager"]
Strategy = Literal["buckets", "dynamic", "fixed", "exact"]
Scope = Literal["full", "regional"]
OnFailure = Literal["eager", "fail"]
Attention = Literal["default", "math", "flash", "efficient", "cudnn"]


class ShapesConfig(Section):
    """Which sizes are warmed and how a request meets them."""

    strategy: Strategy = "buckets"
    """`buckets`: every size below is compiled and warmed. `dynamic`: one graph for all sizes; of a
    module for its one bucketed dimension, between its least and greatest bucket. `fixed`: one size,
    everything is resampled. `exact`: plain torch.compile, which compiles inside requests; to
    compare with."""
    buckets: Listed[BucketPair] = ()
    """`[height, width]` in pixels, multiples of 8 (16 for Flux and SD3); with `fit: mask` of what
    the network halves evenly: 32 for SDXL, 64 for SD 1.5, 16 for Flux and SD3. Empty: the one
    default size of the pipeline."""
    batch_sizes: BatchSizes = (1,)
    """Rows that are compiled for; a batch is filled up to the next one. `dynamic`: one graph per
    bucket for all of them, and one for a single row."""
    fit: Fit = "pad"
    """How a picture meets its bucket. `pad`: the smallest bucket that covers it, and the asked size
    is cut out. `resize`: the bucket of nearest shape, resampled to the asked size. `mask`: painted
    at its own size inside the bucket, as diffusers alone would. See fit.md."""
    mask_only: bool = False
    """With `fit: mask`: pictures that fill their bucket run the graph with masks too, which halves
    warm-up and makes their steps a little slower."""
    vae_buckets: Listed[BucketPair] = ()
    """With `fit: mask` and `vae.decoder` or `vae.encoder` among the targets: `[height, width]` in
    pixels of what those work at, one picture at a time, in the smallest that covers it. Empty: the
    same as `buckets`."""
    oversize: Oversize = "reject"
    """What no bucket covers. `reject`: a 400. `downscale`: the bucket of nearest shape (with `fit:
    mask` the one that holds most of the asked shape), enlarged. `eager`: as it is, uncompiled."""
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
                f"strategy fixed generates one size, but {len(self.buckets)} buckets are listed; "
                "keep one, or use strategy: buckets",
                "pt2.shapes.buckets",
            )
        if self.strategy == "fixed" and self.fit == "pad":
            raise ConfigError(
                "strategy fixed resizes every picture; use fit: resize, or leave it out",
                "pt2.shapes.fit",
            )
        if self.strategy == "fixed" and self.fit == "mask":
            raise ConfigError(
                "strategy fixed resizes every picture; use strategy: buckets", "pt2.shapes.fit"
            )
        if self.mask_only and self.fit != "mask":
            raise ConfigError("is for fit: mask", "pt2.shapes.mask_only")
        refuse_twice(self.vae_buckets, "pt2.shapes.vae_buckets")
        if self.vae_buckets and not any(self.masks):
            raise ConfigError("is for fit: mask", "pt2.shapes.vae_buckets")
        return self

    @property
    def masks(self) -> tuple[bool, ...]:
        """Whether the graph of a run has masks: the values that need warming. Strategies whose
        canvas is the picture have none.
        """
        if self.fit != "mask" or self.strategy != "buckets":
            return (False,)
        # a run that is always the same to the last bit is always of the same graph
        return (True,) if self.mask_only or self.invariant else (True, False)


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
    chooses. `flash` takes no masks (`fit: mask`)."""
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

    @property
    def against_openvino(self) -> dict[str, str]:
        """By YAML path, what means nothing for a graph that torch.export made and OpenVINO runs."""
        reasons = {
            "pt2.shapes.strategy": self.shapes.strategy in ("dynamic", "exact")
            and f"strategy {self.shapes.strategy} has no list of shapes to make OpenVINO models "
            "for; use buckets or fixed",
            "pt2.scope": self.scope == "regional"
            and "OpenVINO takes whole targets; use scope: full",
            "pt2.attention": self.attention != "default"
            and "OpenVINO has an attention of its own; leave it out",
        }
        return {path: reason for path, reason in reasons.items() if reason}

    @model_validator(mode="after")
    def _openvino_exports(self) -> Pt2Config:
        packages = {"pt2.export.aot_compile": "packages are Inductor's; use backend: inductor"}
        reasons = self.against_openvino | (packages if self.export.aot_compile else {})
        for path, reason in reasons.items() if self.openvino else ():
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

    @model_validator(mode="after")
    def _vae_is_compiled(self) -> Pt2Config:
        if self.shapes.vae_buckets and not any(name.startswith("vae.") for name in self.targets):
            raise ConfigError(
                "is for a VAE that is compiled; add vae.decoder or vae.encoder to pt2.targets, or "
                "leave it out",
                "pt2.shapes.vae_buckets",
            )
        return self

    @model_validator(mode="after")
    def _attention_takes_masks(self) -> Pt2Config:
        if self.attention == "flash" and any(self.shapes.masks):
            raise ConfigError(
                "flash takes no mask, which fit: mask needs; use efficient, cudnn, math or default",
                "pt2.attention",
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
