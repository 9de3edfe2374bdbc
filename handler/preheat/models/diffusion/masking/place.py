"""Where a row lies on its canvas: in the upper left, in latent cells or in tokens of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

PATCH = 2
"""Latent cells a side that Flux's pipelines pack into one token."""


@dataclass(frozen=True, slots=True)
class Place:
    """Height and width of a row and of its canvas, in latent cells.

    Latents are (rows, channels, height, width), or (rows, tokens, channels) where they are packed.
    """

    cells: tuple[int, int]
    canvas: tuple[int, int]

    def times(self, cell: int) -> Place:
        """The same where a latent cell is `cell` a side: in pixels."""
        (tall, wide), (height, width) = self.cells, self.canvas
        return Place((tall * cell, wide * cell), (height * cell, width * cell))

    def alone(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that this row's latents have by themselves, where those of a run have this one.

        Raises:
            ValueError: no latents of this canvas have it.
        """
        (height, width), (tall, wide) = self.canvas, self.cells
        if len(shape) == 4 and tuple(shape[2:]) == self.canvas:
            return (1, shape[1], tall, wide)
        if len(shape) == 3 and shape[1] * PATCH**2 == height * width:
            return (1, tall * wide // PATCH**2, shape[2])
        raise ValueError(f"no latents of {height}x{width} cells have the shape {tuple(shape)}")

    def lay(self, latents: torch.Tensor) -> torch.Tensor:
        """This row's latents on the canvas, with zeros beside them."""
        (height, width), (tall, wide) = self.canvas, self.cells
        margins = (0, width - wide, 0, height - tall)
        if latents.dim() == 4:
            return functional.pad(latents, margins)
        grid = latents.reshape(1, tall // PATCH, wide // PATCH, -1)
        packed = (0, 0, *(margin // PATCH for margin in margins))
        return functional.pad(grid, packed).flatten(1, 2)

    def grid(self, latents: torch.Tensor) -> torch.Tensor:
        """This row's own part as (rows, channels, height, width), in tokens if it is packed."""
        if latents.dim() == 4:
            return latents
        tall, wide = (side // PATCH for side in self.cells)
        return latents.reshape(len(latents), tall, wide, -1).movedim(3, 1)

    def cut(self, latents: torch.Tensor) -> torch.Tensor:
        """The row's own part of one row of latents on the canvas."""
        (height, width), (tall, wide) = self.canvas, self.cells
        if latents.dim() == 4:
            return latents[:, :, :tall, :wide]
        grid = latents.reshape(1, height // PATCH, width // PATCH, -1)
        return grid[:, : tall // PATCH, : wide // PATCH].flatten(1, 2)
