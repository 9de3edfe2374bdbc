"""A call of a masked module, for its check: with garbage beside, and without masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from preheat.models.diffusion.masking import garbage
from preheat.models.diffusion.masking.place import Place
from preheat.models.diffusion.masking.rows import own_cells


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a masked module for rows that are all of one size, at their `place`.

    Args:
        cells: what a latent cell is in what it is given, and in what it gives, a side.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place
    cells: tuple[int, int] = (1, 1)

    @property
    def given(self) -> Place:
        """Where the rows are in what it is given."""
        return self.place.times(self.cells[0])

    @property
    def made(self) -> Place:
        """Where they are in what it gives."""
        return self.place.times(self.cells[1])

    def masked(self, beside: float) -> torch.Tensor:
        """The rows' own part of what it gives, where all else is `beside`: in what it is given, and
        at every depth where it masks that.
        """
        latents = self._latents
        own = own_cells([self.given] * len(latents), latents)
        with garbage.outside(self.module, beside):
            result = self._called(latents.masked_fill(~own, beside), self.kwargs)
        return _cut(result, self.made)

    def alone(self) -> torch.Tensor:
        """What it gives for the rows' own part without masks."""
        kwargs = {name: value for name, value in self.kwargs.items() if name != "sizes"}
        if "img_ids" in kwargs:
            kwargs["img_ids"] = self.place.cut(kwargs["img_ids"][None])[0]
        return self._called(_cut(self._latents, self.given).contiguous(), kwargs)

    @property
    def _latents(self) -> torch.Tensor:
        latents: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return latents

    def _called(self, latents: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if self.args:
            result = self.module(latents, *self.args[1:], **kwargs)
        else:
            result = self.module(**{**kwargs, "hidden_states": latents})
        # a denoiser gives a tuple, a VAE's part a tensor
        return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def _cut(rows: torch.Tensor, place: Place) -> torch.Tensor:
    return torch.cat([place.cut(row) for row in rows[:, None]])
