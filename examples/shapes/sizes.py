"""The sizes that training paints at, height and width in pixels, and how often."""

from __future__ import annotations

import numpy as np

SIZES: dict[tuple[int, int], int] = {
    (128, 128): 4,
    (96, 128): 1,
    (128, 96): 1,
    (96, 160): 2,
    (160, 96): 2,
    (128, 160): 2,
    (160, 128): 2,
    (96, 192): 2,
    (192, 96): 2,
    (128, 192): 2,
    (192, 128): 2,
    # half of 32: an odd number of cells at the UNet's lowest level
    (112, 144): 1,
    (144, 112): 1,
}


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """One of them, by its weight."""
    shares = np.fromiter(SIZES.values(), float)
    return list(SIZES)[rng.choice(len(SIZES), p=shares / shares.sum())]
