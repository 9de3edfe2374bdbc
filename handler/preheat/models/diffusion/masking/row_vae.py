"""A VAE that works row by row, each at its own size or in the smallest of its buckets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from math import prod
from typing import Any, Literal, get_args

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from preheat.buckets import Bucket
from preheat.models.diffusion.masking.call import Call
from preheat.models.diffusion.masking.place import Place
from preheat.models.diffusion.masking.rewrite import rewrite
from preheat.models.diffusion.masking.seats import VaeBuckets

Part = Literal["decoder", "encoder"]
PARTS: tuple[Part, ...] = get_args(Part)
_CHECKED_CELLS = 512
"""Latent cells that a check looks at, at least: a picture of 1024x1024 has 32 times as many."""


class RowVae:
    """Takes the place of diffusers' slicing at `vae.decode` and `vae.encode`, so that what follows
    the decoder sees each picture without the rest of its canvas.

    Args:
        pipes: diffusers' pipelines, one a task, of the same parts.
        cell: pixels a side of a latent cell.
        compiled: parts that are masked and work in `buckets`; the others at each row's own size.
        canvases: sizes in pixels of the runs whose rows lie in buckets though they are not told
            apart (`of`); runs of other sizes are diffusers' own.

    Raises:
        ConfigError: a part cannot be masked.
    """

    def __init__(
        self,
        pipes: Sequence[Any],
        cell: int,
        compiled: Collection[Part] = (),
        buckets: VaeBuckets | None = None,
        canvases: Collection[Bucket] = (),
    ) -> None:
        self._vae: Any = pipes[0].vae
        self._cell, self._buckets, self._canvases = cell, buckets, frozenset(canvases)
        self._compiled = frozenset(compiled)
        # pixels a side of a latent cell in what a part is given, and in what it gives
        self._cells: dict[Part, tuple[int, int]] = {"decoder": (1, cell), "encoder": (cell, 1)}
        for part in sorted(self._compiled):
            module = getattr(self._vae, part)
            rewrite(module, f"vae.{part}")
            module.register_forward_pre_hook(self._size, with_kwargs=True)
        self._decode: Callable[..., Any] = self._vae.decode
        self._encode: Callable[..., Any] = self._vae.encode
        self._vae.decode, self._vae.encode = self._decode_rows, self._encode_rows
        for pipe in pipes:
            if getattr(pipe, "safety_checker", None) is not None:
                pipe.run_safety_checker = self._checked(pipe.run_safety_checker)
            if getattr(pipe, "watermark", None) is not None:
                pipe.watermark.apply_watermark = self._marked(pipe.watermark.apply_watermark)
        self._places: Sequence[Place] | None = None
        self._sizes: torch.Tensor | None = None  # of the row that a masked part works on

    @contextmanager
    def of(self, places: Sequence[Place]) -> Iterator[None]:
        """Runs in here have rows that lie there."""
        self._places = places
        # diffusers encodes one row after the other, perhaps several times over
        self._turns = cycle(places)
        try:
            yield
        finally:
            self._places = None

    def call(self, part: Part, bucket: Bucket, size: Bucket) -> Call:
        """A call of a compiled part for pictures of this size in this one of its buckets: as many
        as it takes for the largest rounding among their cells not to be chance.
        """
        module, cells = getattr(self._vae, part), self._cells[part]
        place = Place(self._in_cells(size), self._in_cells(bucket))
        weight = module.conv_in.weight
        rows = -(-_CHECKED_CELLS // prod(place.cells))
        shape = (rows, weight.shape[1], *place.times(cells[0]).canvas)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        sizes = torch.tensor([place.cells] * rows, device=weight.device)
        return Call(module, (drawn.to(weight),), {"sizes": sizes}, place, cells)

    def _in_cells(self, size: Bucket) -> tuple[int, int]:
        return size.height // self._cell, size.width // self._cell

    def _size(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a part's forward, and so before the router that stands in for it."""
        return None if self._sizes is None else (args, {**kwargs, "sizes": self._sizes})

    def _decode_rows(self, z: torch.Tensor, return_dict: bool = True, **others: Any) -> Any:
        places = self._seated("decoder", z)
        if places is None:
            return self._decode(z, return_dict=return_dict, **others)

        def decoded(latents: torch.Tensor) -> torch.Tensor:
            (image,) = self._decode(latents, return_dict=False)
            return image  # type: ignore[no-any-return]

        images = self._row_by_row("decoder", places, z, decoded)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def _encode_rows(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        places = self._seated("encoder", x)
        if places is None:
            return self._encode(x, return_dict=return_dict)

        def encoded(image: torch.Tensor) -> torch.Tensor:
            (latents,) = self._encode(image, return_dict=False)
            return latents.parameters  # type: ignore[no-any-return]

        laid = DiagonalGaussianDistribution(self._row_by_row("encoder", places, x, encoded))
        return AutoencoderKLOutput(latent_dist=laid) if return_dict else (laid,)

    def _seated(self, part: Part, given: torch.Tensor) -> Sequence[Place] | None:
        """Where the rows that a part is given lie; None where they are diffusers' to slice."""
        if self._places is not None:
            # all rows, or some: then the order of the calls tells whose they are
            whole = len(given) == len(self._places)
            return self._places if whole else [next(self._turns) for _ in given]
        if part not in self._compiled:
            return None
        cell = self._cell // self._cells[part][0]
        canvas = Bucket(given.shape[2] * cell, given.shape[3] * cell)
        cells = self._in_cells(canvas)
        return [Place(cells, cells)] * len(given) if canvas in self._canvases else None

    def _row_by_row(
        self,
        part: Part,
        places: Sequence[Place],
        given: torch.Tensor,
        call: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What `call` gives for each row's own part of its canvas, laid there again."""
        made: list[torch.Tensor] = []
        before, after = self._cells[part]
        for place, row in zip(places, given[:, None], strict=True):
            own = place.times(before).cut(row).contiguous()
            picture = Bucket(*place.times(self._cell).cells)
            seat = self._buckets.seat(picture) if self._buckets and part in self._compiled else None
            seated = Place(place.cells, self._in_cells(seat.bucket if seat else picture))
            if seat and seat.masked:
                self._sizes = torch.tensor([place.cells], device=given.device)
            try:
                result = call(seated.times(before).lay(own))
            finally:
                self._sizes = None
            made.append(place.times(after).lay(seated.times(after).cut(result)))
        return torch.cat(made)

    def _checked(self, check: Callable[..., Any]) -> Callable[..., Any]:
        """A safety checker that sees each picture without the rest of its canvas."""

        def check_rows(images: torch.Tensor, *how: Any) -> Any:
            if self._places is None:
                return check(images, *how)
            flags: list[bool] = []

            def alone(image: torch.Tensor) -> torch.Tensor:
                checked, flagged = check(image, *how)
                flags.extend(flagged)
                return torch.as_tensor(checked)

            return self._pictures(images, alone), flags

        return check_rows

    def _marked(self, mark: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def mark_rows(images: torch.Tensor) -> torch.Tensor:
            return mark(images) if self._places is None else self._pictures(images, mark)

        return mark_rows

    def _pictures(
        self, images: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """What `call` gives for each row's own pixels, (1, channels, height, width), laid on the
        canvas again.
        """
        assert self._places is not None
        pixels = [place.times(self._cell) for place in self._places]
        rows = zip(pixels, images[:, None], strict=True)
        return torch.cat([place.lay(call(place.cut(row).contiguous())) for place, row in rows])
