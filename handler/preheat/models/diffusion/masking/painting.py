"""Runs of a pipeline whose rows have sizes of their own, each in the upper left of one canvas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch.nn import functional

from preheat.buckets import Bucket
from preheat.errors import ConfigError
from preheat.models.diffusion.masking import garbage
from preheat.models.diffusion.masking.noise import (
    draw_rows,
    draws_otherwise,
    own_tokens,
    row_generator,
    shift_rows,
)
from preheat.models.diffusion.masking.place import PATCH, Place
from preheat.models.diffusion.masking.rewrite import rewrite


class Rows:
    """The rows of a run.

    Args:
        pixels: their sizes.
        canvas: that of the whole.
        cell: pixels a side of a latent cell.
    """

    def __init__(self, pixels: Sequence[Bucket], canvas: Bucket, cell: int) -> None:
        self.pixels, self.cell = pixels, cell
        height, width = canvas.height // cell, canvas.width // cell
        self.places = [
            Place((one.height // cell, one.width // cell), (height, width)) for one in pixels
        ]
        # diffusers encodes one row after the other, perhaps several times over
        self.encoded = cycle(self.places)
        self._made: dict[object, torch.Tensor] = {}  # what every step is told, once a run

    def generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """One a row, whose noise has the row's size."""
        return [row_generator(*each) for each in zip(seeds, self.places, strict=True)]

    def keep(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents of all rows, with 0 outside of each."""
        key = latents.shape, latents.device
        if key not in self._made:
            self._made[key] = own_cells(self.places, latents)
        return torch.where(self._made[key], latents, 0)

    def sizes(self, rows: int, device: torch.device) -> torch.Tensor:
        """(rows, 2) in cells; guidance has every row twice, one run of all after the other."""
        key = rows, device
        if key not in self._made:
            cells = torch.tensor([place.cells for place in self.places], device=device)
            self._made[key] = cells.repeat(rows // len(cells), 1)
        return self._made[key]

    def time_ids(self, like: torch.Tensor) -> torch.Tensor:
        """SDXL's size conditions, (rows, 6): the size of each row as what it was and is to be."""
        key = len(like), like.device, like.dtype
        if key not in self._made:
            told = [[one.height, one.width, 0, 0, one.height, one.width] for one in self.pixels]
            self._made[key] = like.new_tensor(told).repeat(len(like) // len(told), 1)
        return self._made[key]

    @property
    def num_tokens(self) -> int:
        """Of each row, where a token is 2x2 cells.

        Raises:
            ValueError: it is not the same.
        """
        (number,) = {place.cells[0] * place.cells[1] // PATCH**2 for place in self.places}
        return number

    def one_by_one(
        self, images: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """What `call` gives for each row's own pixels, (1, channels, height, width), laid on the
        canvas again.
        """
        made: list[torch.Tensor] = []
        for image, size in zip(images[:, None], self.pixels, strict=True):
            own = call(image[:, :, : size.height, : size.width].contiguous())
            margins = (0, images.shape[3] - size.width, 0, images.shape[2] - size.height)
            made.append(functional.pad(own, margins))
        return torch.cat(made)


def own_cells(places: Sequence[Place], latents: torch.Tensor) -> torch.Tensor:
    """Where each row's own part of these latents is: True there, in their shape."""
    whole = zip(places, torch.ones_like(latents, dtype=torch.bool)[:, None], strict=True)
    return torch.cat([place.lay(place.cut(row)) for place, row in whole])


class _Seen(BaseException):
    """Ends a run at its first call of the denoiser."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a denoiser for rows that are all of one size, at their `place`."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place

    def masked(self, beside: float) -> torch.Tensor:
        """The rows' own cells of what it gives, where all others are `beside`: in what it is given,
        and at every depth where it masks them.
        """
        latents = self._latents
        own = own_cells([self.place] * len(latents), latents)
        with garbage.outside(self.module, beside):
            return self._cut(self._called(latents.masked_fill(~own, beside), self.kwargs))

    def alone(self) -> torch.Tensor:
        """What it gives for these cells without masks."""
        kwargs = {name: value for name, value in self.kwargs.items() if name != "sizes"}
        if "img_ids" in kwargs:
            kwargs["img_ids"] = self.place.cut(kwargs["img_ids"][None])[0]
        return self._called(self._cut(self._latents).contiguous(), kwargs)

    @property
    def _latents(self) -> torch.Tensor:
        latents: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return latents

    def _called(self, latents: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if self.args:
            (result,) = self.module(latents, *self.args[1:], **kwargs)
        else:
            (result,) = self.module(**{**kwargs, "hidden_states": latents})
        return result  # type: ignore[no-any-return]

    def _cut(self, latents: torch.Tensor) -> torch.Tensor:
        return self._each(latents, self.place.cut)

    def _each(
        self, latents: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return torch.cat([change(row) for row in latents[:, None]])


class MaskedPainting:
    """Teaches a loaded pipeline to paint rows of several sizes at once.

    The VAE works row by row at each row's own size, so that what follows it sees the picture's own
    pixels, and none is computed in vain.

    Args:
        pipes: diffusers' pipelines, one a task, of the same parts.
        denoiser: name of the module that is rewritten.
        cell: pixels a side of a latent cell.
        shifts: the scheduler's steps depend on a row's number of tokens.

    Raises:
        ConfigError: it cannot be exact.
    """

    def __init__(self, pipes: Sequence[Any], denoiser: str, cell: int, *, shifts: bool) -> None:
        pipe, self._cell, self._shifts = pipes[0], cell, shifts
        for each in pipes:
            _check(each)
        module = getattr(pipe, denoiser)
        rewrite(module, denoiser)
        module.register_forward_pre_hook(self._size, with_kwargs=True)
        draw_rows(*pipes, pipe.scheduler, pipe.vae, pipe.vae.decoder)
        shift_rows(*pipes)
        self._decode: Callable[..., Any] = pipe.vae.decode
        self._encode: Callable[..., Any] = pipe.vae.encode
        pipe.vae.decode, pipe.vae.encode = self._decode_rows, self._encode_rows
        for each in pipes:
            if getattr(each, "safety_checker", None) is not None:
                each.run_safety_checker = self._checked(each.run_safety_checker)
            if getattr(each, "watermark", None) is not None:
                each.watermark.apply_watermark = self._marked(each.watermark.apply_watermark)
        self._rows: Rows | None = None
        self._is_seen: Callable[[Call], None] | None = None

    def first_call(self, run: Callable[[], object]) -> Call:
        """The first call of the denoiser in a masked run of rows of one size; it ends the run."""
        seen: list[Call] = []
        self._is_seen = seen.append
        try:
            run()
        except _Seen:
            return seen[0]
        finally:
            self._is_seen = None
        raise ValueError("the run has not called the denoiser")

    @contextmanager
    def of(self, sizes: Sequence[Bucket], canvas: Bucket) -> Iterator[Rows]:
        """Runs in here have rows of these sizes on this canvas, in pixels."""
        self._rows = rows = Rows(sizes, canvas, self._cell)
        # Flux's pipelines count tokens always, also for a scheduler that does not ask
        token = own_tokens.set((lambda: rows.num_tokens) if self._shifts else None)
        try:
            yield rows
        finally:
            self._rows = None
            own_tokens.reset(token)

    def _size(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the denoiser's forward, and so before the router that stands in for it."""
        if self._rows is None or "sizes" in kwargs:
            return None
        latents = args[0] if args else kwargs["hidden_states"]
        kwargs = {**kwargs, "sizes": self._rows.sizes(len(latents), latents.device)}
        conditions = kwargs.get("added_cond_kwargs") or {}
        if "time_ids" in conditions:
            ids = self._rows.time_ids(conditions["time_ids"])
            kwargs["added_cond_kwargs"] = {**conditions, "time_ids": ids}
        if self._is_seen is not None:
            self._is_seen(Call(module, args, kwargs, self._rows.places[0]))
            raise _Seen
        return args, kwargs

    def _decode_rows(self, z: torch.Tensor, return_dict: bool = True, **others: Any) -> Any:
        if self._rows is None:
            return self._decode(z, return_dict=return_dict, **others)
        made: list[torch.Tensor] = []
        for place, row in zip(self._rows.places, z[:, None], strict=True):
            (image,) = self._decode(place.cut(row).contiguous(), return_dict=False)
            pixels = [self._cell * side for side in place.canvas]
            margins = (0, pixels[1] - image.shape[3], 0, pixels[0] - image.shape[2])
            made.append(functional.pad(image, margins))
        images = torch.cat(made)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def _encode_rows(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """All rows, or one: then the order of the calls tells whose it is."""
        if self._rows is None:
            return self._encode(x, return_dict=return_dict)
        whole = len(x) == len(self._rows.places)
        places = self._rows.places if whole else [next(self._rows.encoded) for _ in x]
        made: list[torch.Tensor] = []
        for place, image in zip(places, x[:, None], strict=True):
            height, width = (self._cell * side for side in place.cells)
            (alone,) = self._encode(image[:, :, :height, :width].contiguous(), return_dict=False)
            made.append(place.lay(alone.parameters))
        laid = DiagonalGaussianDistribution(torch.cat(made))
        return AutoencoderKLOutput(latent_dist=laid) if return_dict else (laid,)

    def _checked(self, check: Callable[..., Any]) -> Callable[..., Any]:
        """A safety checker that sees each picture without the rest of its canvas."""

        def check_rows(image: torch.Tensor, *how: Any) -> Any:
            if self._rows is None:
                return check(image, *how)
            flags: list[bool] = []

            def alone(row: torch.Tensor) -> torch.Tensor:
                checked, flagged = check(row, *how)
                flags.extend(flagged)
                return torch.as_tensor(checked)

            return self._rows.one_by_one(image, alone), flags

        return check_rows

    def _marked(self, mark: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def mark_rows(images: torch.Tensor) -> torch.Tensor:
            return mark(images) if self._rows is None else self._rows.one_by_one(images, mark)

        return mark_rows


def _check(pipe: Any) -> None:
    """Refuse what looks at all of a canvas, or is not known here.

    Raises:
        ConfigError: it does.
    """
    scheduler, vae = pipe.scheduler, pipe.vae
    scores = pipe.config.get("requires_aesthetics_score")
    reasons = {
        f"{type(scheduler).__name__} with thresholding": scheduler.config.get("thresholding"),
        f"{type(scheduler).__name__}, whose noise it cannot draw": draws_otherwise(scheduler),
        f"a VAE that is an {type(vae).__name__}": type(vae) is not AutoencoderKL,
        "a VAE that works in tiles": getattr(vae, "use_tiling", False),
        "a refiner": scores,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"mask cannot be had with {reason}; use pad", "pt2.shapes.fit")
