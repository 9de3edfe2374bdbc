"""Runs of a pipeline whose rows have sizes of their own, each in the upper left of one canvas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from preheat.buckets import Bucket
from preheat.errors import ConfigError
from preheat.models.diffusion.masking.call import Call
from preheat.models.diffusion.masking.noise import (
    draw_rows,
    draws_otherwise,
    own_tokens,
    shift_rows,
)
from preheat.models.diffusion.masking.rewrite import rewrite
from preheat.models.diffusion.masking.row_vae import RowVae
from preheat.models.diffusion.masking.rows import Rows


class _Seen(BaseException):
    """Ends a run at its first call of the denoiser."""


class MaskedPainting:
    """Teaches a loaded pipeline to paint rows of several sizes at once.

    Args:
        pipes: diffusers' pipelines, one a task, of the same parts.
        denoiser: name of the module that is rewritten.
        vae: told where the rows lie.
        cell: pixels a side of a latent cell.
        shifts: the scheduler's steps depend on a row's number of tokens.

    Raises:
        ConfigError: it cannot be exact.
    """

    def __init__(
        self, pipes: Sequence[Any], denoiser: str, vae: RowVae, cell: int, *, shifts: bool
    ) -> None:
        pipe, self._vae, self._cell, self._shifts = pipes[0], vae, cell, shifts
        module = getattr(pipe, denoiser)
        rewrite(module, denoiser)
        module.register_forward_pre_hook(self._size, with_kwargs=True)
        draw_rows(*pipes, pipe.scheduler, pipe.vae, pipe.vae.decoder)
        shift_rows(*pipes)
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
            with self._vae.of(rows.places):
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


def check(pipe: Any) -> None:
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
