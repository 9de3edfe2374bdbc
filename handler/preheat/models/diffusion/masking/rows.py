"""The rows of a run, each in the upper left of one canvas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preheat.buckets import Bucket
from preheat.models.diffusion.masking.noise import row_generator
from preheat.models.diffusion.masking.place import PATCH, Place


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


def own_cells(places: Sequence[Place], latents: torch.Tensor) -> torch.Tensor:
    """Where each row's own part of these latents is: True there, in their shape."""
    whole = zip(places, torch.ones_like(latents, dtype=torch.bool)[:, None], strict=True)
    return torch.cat([place.lay(place.cut(row)) for place, row in whole])
