"""Which cells of a canvas are a row's own, at every level of a network.

A row lies in the upper left of the canvas. Its masks are made inside the graph from its size, which
is a tensor, so that no graph depends on a size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Masks:
    """The masks of one call.

    Args:
        sizes: (rows, 2), whole numbers: height and width of each row in latent cells.
        height: that of the whole canvas in latent cells.
        width: likewise.
    """

    def __init__(self, sizes: torch.Tensor, height: int, width: int) -> None:
        self.sizes, self._height, self._width = sizes, height, width
        self._made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def at(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At the level where the whole canvas is `height` x `width`: each row's own cells, (rows,
        1, height, width), and how many they are, (rows,) in float32.

        What a row is at each level is what a halving leaves of it, half cells rounded up.
        """
        known = self._made.get((height, width))
        if known is not None:
            return known
        tall = (self.sizes[:, 0] * height + self._height - 1) // self._height
        wide = (self.sizes[:, 1] * width + self._width - 1) // self._width
        down = torch.arange(height, device=tall.device) < tall[:, None]
        across = torch.arange(width, device=wide.device) < wide[:, None]
        cells = down[:, None, :, None] & across[:, None, None, :]
        made = cells, (tall * wide).float()
        self._made[height, width] = made
        return made

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, (rows, channels, height, width), with 0 where a row has no cells.

        A product would do as well but for infinities and NaN, which it keeps.
        """
        cells, _ = self.at(tensor.shape[-2], tensor.shape[-1])
        return torch.where(cells, tensor, 0)

    def tokens(self, height: int, width: int) -> torch.Tensor:
        """The cells of that level as tokens, row after row: (rows, height x width)."""
        return self.at(height, width)[0].flatten(1)


class Canvas:
    """What the masked parts of one module share: the masks of the call that it is in; None where
    every row fills the canvas.
    """

    def __init__(self) -> None:
        self.masks: Masks | None = None

    @contextmanager
    def of(self, sizes: torch.Tensor | None, height: int, width: int) -> Iterator[Masks | None]:
        """The masks of these sizes, until the call ends; see `Masks`."""
        self.masks = masks = None if sizes is None else Masks(sizes, height, width)
        try:
            yield masks
        finally:
            self.masks = None
