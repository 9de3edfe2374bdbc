"""Small pictures of latents that are still being denoised: each cell is one pixel, coloured by a
linear map.

The map is fitted to the VAE at hand, from how it encodes plain colours. So it is right about the
colour of areas and blind to texture, which a VAE keeps in what differs between plain and patterned
cells; for "is this going where I want" it is enough, and it costs a product of small matrices where
decoding would cost a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

LEVELS = (0.0, 0.5, 1.0)
_RIDGE = 1e-3
"""Of the mean variance of a channel: plain colours span three directions of 4 or 16, and the others
must not be blown up.
"""


def plain_colours() -> torch.Tensor:
    """RGB from 0 to 1, (27, 3): every mixture of `LEVELS`."""
    return torch.tensor(list(product(LEVELS, repeat=3)))


@dataclass(frozen=True, slots=True)
class LatentColours:
    """RGB from 0 to 1 as `latent @ weight + bias`; weight (channels, 3), bias (3,), both float32 on
    the CPU.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def fit(cls, latents: torch.Tensor, colours: torch.Tensor) -> LatentColours:
        """The map of least squares, with a little ridge, from latents (samples, channels) to
        colours (samples, 3).
        """
        latents, colours = latents.double().cpu(), colours.double().cpu()
        centre, middle = latents.mean(0), colours.mean(0)
        spread, tint = latents - centre, colours - middle
        square = spread.T @ spread
        ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        weight = torch.linalg.solve(square + ridge, spread.T @ tint)
        return cls(weight.float(), (middle - centre @ weight).float())

    def generate(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """8-bit RGB, (height, width, 3), of one picture's latents, (channels, height, width)."""
        cells = latents.float().cpu().permute(1, 2, 0)  # (height, width, channels)
        pixels = ((cells @ self.weight + self.bias) * 255).round().clamp(0, 255).to(torch.uint8)
        array: NDArray[np.uint8] = pixels.numpy()
        return array
