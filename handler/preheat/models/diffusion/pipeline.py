"""Diffusers pipelines behind one call: what a family needs is a row in a table, diffusers does the
denoising.

One loaded pipeline serves text-to-image, image-to-image and inpainting: diffusers' Auto pipelines
share the components, so the compiled targets are shared too.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from preheat.buckets import Bucket
from preheat.config.diffusion import PipelineConfig, Task, check_scheduler
from preheat.device import DTYPES
from preheat.errors import HubError, ModelError, RequestError, in_one_line
from preheat.models.base import TimedPart
from preheat.models.diffusion.mask_check import checked, odd_size
from preheat.models.diffusion.masking.call import Call
from preheat.models.diffusion.masking.painting import MaskedPainting, check
from preheat.models.diffusion.masking.row_vae import Part, RowVae
from preheat.models.diffusion.masking.rows import Rows
from preheat.models.diffusion.masking.seats import VaeBuckets
from preheat.models.diffusion.previews import LatentColours, plain_colours
from preheat.models.diffusion.prompts import TEXT_ENCODERS, Reader
from preheat.models.diffusion.request import ImageRequest, run_steps
from preheat.models.diffusion.unserved import denoiser_refusal, folder_refusal

logger = logging.getLogger(__name__)

_COLOUR_CELLS = 8
"""Latent cells a side of the plain pictures that previews are fitted to: 27 of 64x64 pixels are a
tenth of one 1024x1024.
"""


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between pipeline families.

    Args:
        name: for logs and fingerprints.
        denoiser: attribute of the module that runs once a step.
        guidance: `cfg` doubles the batch while guidance_scale > 1; `embedded` feeds the scale to
            the model as a number.
        patch: latent cells a side that the denoiser packs into one token; a bucket must be a
            multiple of VAE scale x patch.
        size_conditioning: the denoiser is told sizes (SDXL micro-conditioning, arXiv 2307.01952,
            section 2.2).
        upcasts: its pipelines obey the VAE's `force_upcast`; diffusers' others ignore it.
    """

    name: str
    denoiser: Literal["unet", "transformer"]
    guidance: Literal["cfg", "embedded"]
    patch: int
    size_conditioning: bool = False
    upcasts: bool = False


FAMILIES: Mapping[str, Family] = {
    "StableDiffusionXLPipeline": Family(
        "sdxl", "unet", "cfg", patch=1, size_conditioning=True, upcasts=True
    ),
    "StableDiffusionPipeline": Family("sd", "unet", "cfg", patch=1),
    "StableDiffusion3Pipeline": Family("sd3", "transformer", "cfg", patch=2),
    "FluxPipeline": Family("flux", "transformer", "embedded", patch=2),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a batch. `image` and `mask` are as large as the batch's bucket."""

    prompt: str
    negative_prompt: str | None
    seed: int
    image: Image.Image | None = None
    mask: Image.Image | None = None
    size: Bucket | None = None
    """What it fills of a masked batch's bucket, in pixels of the upper left; None: all."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that agree in everything a single pipeline call shares."""

    rows: Sequence[Row]
    task: Task
    bucket: Bucket
    num_inference_steps: int
    guidance_scale: float
    strength: float
    masked: bool = False
    """Its rows may be smaller than the bucket."""

    @property
    def num_run_steps(self) -> int:
        """See `ImageRequest.num_run_steps`."""
        return run_steps(
            self.num_inference_steps, None if self.task == "text-to-image" else self.strength
        )


Sketch = Callable[[int], NDArray[np.uint8]]
"""What a row of the batch looks like after a step: a pixel per latent cell, (latent height, latent
width, 3). Only good until the next step.
"""
AfterStep = Callable[[int, int, Sketch], None]
"""Told the number of the denoising step that a run has just done, from 1, and of how many."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What a run of the pipeline gave."""

    pixels: NDArray[np.uint8]
    """(rows, height, width, 3), as large as the bucket."""
    flagged: Sequence[bool] | None = None
    """Of each row, whether the safety checker has blackened it; None where the pipeline has no
    checker.
    """


class DiffusionPipeline:
    """A loaded pipeline folder on its device, ready to generate batches at bucket size."""

    def __init__(self, pipe: Any, family: Family, config: PipelineConfig) -> None:
        self.family = family
        self.guidance_variants = _guidance_variants(family, config)
        self._pipe = pipe
        makers: dict[Task, Callable[[Any], Any]] = {
            "text-to-image": lambda base: base,
            "image-to-image": AutoPipelineForImage2Image.from_pipe,
            "inpainting": AutoPipelineForInpainting.from_pipe,
        }
        self._tasks: dict[Task, Any] = {
            task: make(pipe) for task, make in makers.items() if task in config.tasks
        }
        for task_pipe in self._tasks.values():
            task_pipe.set_progress_bar_config(disable=True)
        self._accepted = {
            task: frozenset(inspect.signature(type(task_pipe).__call__).parameters)
            for task, task_pipe in self._tasks.items()
        }
        self._colours = self._fit_colours()
        self.prompts = Reader.of(pipe, self._accepted_length())
        self._num_timesteps = lru_cache(maxsize=1000)(self._count_timesteps)
        self._masked: MaskedPainting | None = None
        self.mask_error: Mapping[str, float | str] = {}

    @classmethod
    def load(
        cls, folder: str | Path, config: PipelineConfig, device: torch.device
    ) -> DiffusionPipeline:
        """Load a pipeline folder (or hub id) from safetensors.

        Raises:
            ModelError: it is not a diffusers pipeline of a known family, or its weights are not
                safetensors.
            HubError: the hub does not give it.
        """
        # diffusers warns with the text of a prompt that CLIP truncates; prompts are never logged.
        diffusers.utils.logging.set_verbosity_error()
        place = Path(folder)
        _refuse(folder, folder_refusal(place, FAMILIES) if place.is_dir() else None)
        try:
            pipe = AutoPipelineForText2Image.from_pretrained(
                folder,
                torch_dtype=DTYPES[config.dtype],
                use_safetensors=True,
                variant=_weight_variant(Path(folder)),
                local_files_only=Path(folder).is_dir(),
            )
        except (OSError, ValueError) as error:
            # `from None`: the hub's client alone has 60 lines of traceback, and says nothing that
            # is not said here.
            kind = ModelError if Path(folder).is_dir() else HubError
            raise kind(
                f"cannot load a diffusers pipeline from {folder}: {in_one_line(error)}"
            ) from None
        family = FAMILIES.get(type(pipe).__name__)
        if family is None:
            raise ModelError(f"{type(pipe).__name__} is not served; known: {', '.join(FAMILIES)}")
        # a hub id's shows only now
        _refuse(folder, denoiser_refusal(getattr(pipe, family.denoiser).config))
        _replace_scheduler(pipe, config.scheduler)
        if config.fused_lora is not None:
            _fuse_lora(pipe, config.fused_lora)
        _steady_vae(pipe.vae, upcast=family.upcasts)
        pipe.to(device)
        return cls(pipe, family, config)

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(self._tasks)

    @property
    def cell(self) -> int:
        """Pixels a side of a latent cell."""
        return int(self._pipe.vae_scale_factor)

    @property
    def multiple(self) -> int:
        """Pixels that height and width of a bucket must be a multiple of."""
        return self.cell * self.family.patch

    @property
    def grid(self) -> int:
        """Pixels that sizes are rounded to where one graph serves many: a UNet takes another road
        where a halving is uneven.
        """
        levels = getattr(
            getattr(self._pipe, self.family.denoiser).config, "block_out_channels", (0,)
        )
        return self.multiple * int(2 ** (len(levels) - 1))

    @property
    def most_side(self) -> int | None:
        """Pixels that a side can have at most, of a denoiser with a table of positions (SD3)."""
        most = getattr(self._pipe, self.family.denoiser).config.get("pos_embed_max_size")
        return None if most is None else int(most) * self.multiple

    @property
    def default_bucket(self) -> Bucket:
        """The size the model was made for, from its own config."""
        cells = getattr(self._pipe, "default_sample_size", None)
        cells = cells or getattr(self._pipe, self.family.denoiser).config.sample_size
        side = int(cells) * self.cell
        return Bucket(side, side)

    def mask(
        self,
        buckets: Sequence[Bucket],
        vae_buckets: VaeBuckets | None = None,
        compiled: Collection[Part] = (),
    ) -> None:
        """Rewrite the pipeline so that a batch may have rows of several sizes (`Batch.masked`), and
        look whether what is masked is exact in its buckets.

        Args:
            compiled: parts of the VAE that work in `vae_buckets`; the others at each row's size.

        Raises:
            ConfigError: their pictures would not be those that each has alone.
        """
        pipes, cell = list(self._tasks.values()), self.cell
        for pipe in pipes:
            check(pipe)
        vae = RowVae(pipes, cell, compiled, vae_buckets, buckets)
        self._masked = MaskedPainting(
            pipes, self.family.denoiser, vae, cell, shifts=self.shifts_by_size
        )

        def calls() -> Iterator[tuple[str, Call]]:
            for bucket in buckets:
                call = self._first_call(bucket, odd_size(bucket, self.multiple))
                yield f"{self.family.denoiser} in {bucket}", call
            for part, bucket in product(compiled, vae_buckets.sizes if vae_buckets else ()):
                yield f"vae.{part} in {bucket}", vae.call(part, bucket, odd_size(bucket, cell))

        self.mask_error = checked(calls())

    def _first_call(self, bucket: Bucket, size: Bucket) -> Call:
        """The denoiser's first call in a masked run of one row of that size."""
        assert self._masked is not None
        task = self.tasks[0]
        blank = None if task == "text-to-image" else Image.new("RGB", (bucket.width, bucket.height))
        hole = Image.new("L", blank.size, 255) if blank and task == "inpainting" else None
        row = Row("a picture", None, 0, blank, hole, size)
        scale = 2.0 if self.guidance_variants[0] else 0.0
        batch = Batch([row], task, bucket, 2, scale, 1.0, masked=True)
        with torch.no_grad():
            return self._masked.first_call(lambda: self.generate(batch))

    @property
    def shifts_by_size(self) -> bool:
        """Whether the scheduler's steps depend on how many tokens a picture has."""
        return bool(self._pipe.scheduler.config.get("use_dynamic_shifting"))

    def default_targets(self) -> tuple[str, ...]:
        return (self.family.denoiser,)

    def target(self, name: str) -> nn.Module:
        """The module a target names, such as `unet` or `vae.decoder`.

        Raises:
            ModelError: this pipeline has no such module.
        """
        module: Any = self._pipe
        for part in name.split("."):
            module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            raise ModelError(f"pt2.targets: {type(self._pipe).__name__} has no module {name!r}")
        return module

    def parts(self) -> dict[str, TimedPart]:
        """The text encoders, and what may be compiled."""
        pipe, denoiser = self._pipe, self.family.denoiser
        encoders = [getattr(pipe, name, None) for name in TEXT_ENCODERS]
        return {
            "text encoders": TimedPart(
                [(each, "forward") for each in encoders if each is not None]
            ),
            denoiser: TimedPart([(getattr(pipe, denoiser), "forward")], is_target=True),
            "vae.decoder": TimedPart([(pipe.vae, "decode")], is_target=True),
            "vae.encoder": TimedPart([(pipe.vae, "encode")], is_target=True),
        }

    def structure(self) -> dict[str, Any]:
        """What compiled code depends on: every component's class and config, not the weights."""
        parts: dict[str, Any] = {"pipeline": type(self._pipe).__name__}
        for name, component in sorted(self._pipe.components.items()):
            if isinstance(component, nn.Module):
                config = getattr(component, "config", {})
                settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
                parts[name] = [type(component).__name__, settings]
            elif component is not None:
                parts[name] = type(component).__name__
        return parts

    @property
    def order(self) -> int:
        """Calls of the denoiser in all steps but the last: 2 of Heun and its kin."""
        return int(self._pipe.scheduler.order)

    def num_calls(self, request: ImageRequest) -> int:
        """Calls of the denoiser that the scheduler makes of the request's steps: Heun and its kin
        two of most of them.

        Raises:
            RequestError: the scheduler cannot do so many.
        """
        num_steps = request.num_inference_steps
        timesteps = self._num_timesteps(num_steps)
        if request.image is None:
            return timesteps
        # `get_timesteps` of diffusers' image-to-image pipelines: those with a transformer round the
        # start, not the steps, down.
        run = min(num_steps * request.strength, num_steps)
        start = num_steps - int(run) if self.family.denoiser == "unet" else int(num_steps - run)
        return timesteps - start * self.order

    def _count_timesteps(self, num_steps: int) -> int:
        scheduler = type(self._pipe.scheduler).from_config(self._pipe.scheduler.config)
        # `mu` moves the steps and leaves their number.
        shift = {"mu": 0.0} if scheduler.config.get("use_dynamic_shifting") else {}
        try:
            scheduler.set_timesteps(num_steps, **shift)
        # LCM's and TCD's have a most
        except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(
                f"is {num_steps}, which {type(scheduler).__name__} cannot do: {reason}",
                "num_inference_steps",
            ) from None
        return len(scheduler.timesteps)

    def _accepted_length(self) -> int | None:
        """Tokens that T5 is given, which diffusers has as a default of the call; None where there
        is no T5.
        """
        parameter = inspect.signature(type(self._pipe).__call__).parameters.get(
            "max_sequence_length"
        )
        return None if parameter is None else int(parameter.default)

    def generate(self, batch: Batch, after_step: AfterStep = lambda *_: None) -> Generated:
        """Run one batch through diffusers; `after_step` is told of every denoising step that was
        asked for.
        """

        seated: AbstractContextManager[Rows | None] = nullcontext()
        if self._masked is not None and batch.masked:
            sizes = [row.size or batch.bucket for row in batch.rows]
            seated = self._masked.of(sizes, batch.bucket)

        def stepped(
            pipe: Any, index: int, _: Any, tensors: Mapping[str, torch.Tensor]
        ) -> dict[str, torch.Tensor]:
            latents = tensors["latents"] if rows is None else rows.keep(tensors["latents"])
            # The scheduler's own steps may be more than those asked for (Heun, PNDM): then some end
            # none.
            of, calls = batch.num_run_steps, pipe.num_timesteps
            number = (index + 1) * of // calls
            if number > index * of // calls:
                after_step(
                    number, of, lambda row: self._sketch(latents[row : row + 1], batch.bucket)
                )
            return {"latents": latents}

        # In every run, whether or not somebody looks on: what is warmed is what is served.
        watched = {
            "callback_on_step_end": stepped,
            "callback_on_step_end_tensor_inputs": ["latents"],
        }
        arguments = self._arguments(batch) | watched
        with seated as rows:
            if rows is not None:
                arguments["generator"] = rows.generators([row.seed for row in batch.rows])
            with self._drawn_from(arguments["generator"]):
                output = self._tasks[batch.task](**arguments)
        images = output.images  # (rows, 3, height, width) in 0..1
        pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
        return Generated(
            pixels.permute(0, 2, 3, 1).cpu().numpy(), getattr(output, "nsfw_content_detected", None)
        )

    @contextmanager
    def _drawn_from(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """In here the scheduler's steps draw from these, one a row.

        The pipelines with a UNet hand them on (`prepare_extra_step_kwargs`); those of SD3 and Flux
        call `step` without any (diffusers 0.42), and a step that draws (FlowMatchLCM, or FlowMatch-
        Euler with `stochastic_sampling`) would use torch's global generator.
        """
        scheduler = self._pipe.scheduler
        takes = "generator" in inspect.signature(scheduler.step).parameters
        if self.family.denoiser == "unet" or not takes:
            yield
            return
        scheduler.step = partial(scheduler.step, generator=generators)
        try:
            yield
        finally:
            del scheduler.step  # the class's again

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        size = (batch.bucket.height, batch.bucket.width)
        arguments: dict[str, Any] = {
            "prompt": [row.prompt for row in batch.rows],
            "num_inference_steps": batch.num_inference_steps,
            "guidance_scale": batch.guidance_scale,
            # One generator a row, on the CPU: a picture depends on its own seed only, and on no GPU
            # model.
            "generator": [torch.Generator("cpu").manual_seed(row.seed) for row in batch.rows],
            "output_type": "pt",
        }
        if self.family.guidance == "cfg" and batch.rows[0].negative_prompt is not None:
            arguments["negative_prompt"] = [row.negative_prompt or "" for row in batch.rows]
        if batch.task != "text-to-image":
            arguments["image"] = [row.image for row in batch.rows]
            arguments["strength"] = batch.strength
        if batch.task == "inpainting":
            arguments["mask_image"] = [row.mask for row in batch.rows]
        if self.family.size_conditioning:
            # The canvas that is generated is the bucket; the crop to the asked size happens after.
            arguments |= {
                "original_size": size,
                "target_size": size,
                "crops_coords_top_left": (0, 0),
            }
        for name, value in zip(("height", "width"), size, strict=True):
            # some image-to-image pipelines take the size from the image
            if name in self._accepted[batch.task]:
                arguments[name] = value
        return arguments

    def _fit_colours(self) -> LatentColours:
        """How this VAE's latents look. Runs its encoder, so it comes before routers stand in for
        anything.
        """
        vae, colours = self._pipe.vae, plain_colours()
        side = _COLOUR_CELLS * self.cell
        with torch.no_grad():
            plain = (
                (2 * colours - 1)
                .to(vae.device, vae.dtype)[:, :, None, None]
                .expand(-1, -1, side, side)
            )
            encoded = vae.encode(plain)
            # (colours, channels, cells, cells); AutoencoderTiny (TAESD) has no distribution
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
            # away from the border, where the encoder sees its own padding
            inner = latents[:, :, 2:-2, 2:-2]
            return LatentColours.fit(_as_denoised(inner, vae.config).float().mean((2, 3)), colours)

    def _sketch(self, latents: torch.Tensor, bucket: Bucket) -> NDArray[np.uint8]:
        """One picture's latents as `LatentColours` sees them: (1, channels, height, width), or
        packed into tokens.
        """
        if latents.ndim == 3:
            latents = self._pipe._unpack_latents(
                latents, bucket.height, bucket.width, self._pipe.vae_scale_factor
            )
        return self._colours.generate(latents[0])


def _as_denoised(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """What the VAE gives, (rows, channels, height, width), in the scale in which the denoiser has
    it.
    """
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and deviation is not None:  # a few SDXL finetunes
        per_channel = (-1, 1, 1)
        latents = (latents - latents.new_tensor(mean).view(per_channel)) / latents.new_tensor(
            deviation
        ).view(per_channel)
    shifted: torch.Tensor = latents - (getattr(config, "shift_factor", None) or 0.0)
    return shifted * float(config.scaling_factor)


def _guidance_variants(family: Family, config: PipelineConfig) -> tuple[bool, ...]:
    """Whether guidance doubles the batch: the values that need warming, True first (larger)."""
    if family.guidance == "embedded":
        return (False,)
    return {"both": (True, False), "on": (True,), "off": (False,)}[config.guidance]


def _weight_variant(folder: Path) -> str | None:
    """`fp16` for a folder that holds only half-precision files (`*.fp16.safetensors`)."""
    files = list(folder.glob("*/*.safetensors"))
    return "fp16" if files and all(".fp16." in file.name for file in files) else None


def _steady_vae(vae: Any, *, upcast: bool) -> None:
    """Give the VAE the dtype and the batch that it keeps: one picture at a time, whatever the run's
    batch is.

    SDXL's pipelines cast a VAE that says `force_upcast` to float32 and back in the middle of a
    call, and an exception in between leaves it half-way. Its float16 alone overflows, so there it
    is float32 for good, and tensors are cast, which nothing can undo. Slicing is also what lets a
    batch fit that was generated but could not be decoded, and one graph serve every batch size.
    """
    if hasattr(vae, "use_slicing"):
        vae.enable_slicing()
    if not (upcast and getattr(vae.config, "force_upcast", False)):
        return
    vae.register_to_config(force_upcast=False)
    if vae.dtype == torch.float16:
        vae.to(torch.float32)
        vae.encode, vae.decode = _in_float32(vae.encode), _in_float32(vae.decode)


def _in_float32(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: call(tensor.float(), *args, **kwargs)


def _refuse(folder: str | Path, reason: str | None) -> None:
    if reason is not None:
        raise ModelError(f"cannot serve {str(folder)!r}: {reason}")


_GLOBAL_NOISE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
"""Schedulers whose noise comes from a seed of their own and not from the rows' generators."""


def _replace_scheduler(pipe: Any, name: str | None) -> None:
    if name is not None:
        check_scheduler(name)
        if name not in _GLOBAL_NOISE:
            try:
                pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
            # no scipy, or a schedule that it cannot follow
            except (ImportError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ModelError(
                    f"pipeline.scheduler: {name} cannot replace this folder's: {reason}"
                ) from error
    name = name or type(pipe.scheduler).__name__
    if name in _GLOBAL_NOISE:
        raise ModelError(
            f"pipeline.scheduler: {name} draws its noise from a seed of its own, so the same seed "
            "would not give the same picture; DPMSolverMultistepScheduler with algorithm_type "
            "sde-dpmsolver++ in its config is near"
        )


def _fuse_lora(pipe: Any, folder: str) -> None:
    """Add a LoRA into the weights before anything is compiled, so that it costs nothing later."""
    try:
        pipe.load_lora_weights(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"pipeline.fused_lora: {folder}: {in_one_line(error)}") from None
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    logger.info("fused the LoRA in %s", folder)
