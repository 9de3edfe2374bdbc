"""Noise of a row's own size, wherever diffusers draws it, and steps that fit its size.

A picture's noise is a row of numbers from its seed, so that it has to be drawn in the shape that it
has alone and then laid on the canvas. All of diffusers draws through `randn_tensor`, which each
module binds by name, as pipelines bind their `calculate_shift`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from diffusers.utils import torch_utils

from preheat.models.diffusion.masking.place import Place

_drawn = torch_utils.randn_tensor


class RowGenerator(torch.Generator):
    """Draws for a row that lies in the upper left of a canvas."""

    place: Place


def row_generator(seed: int, place: Place) -> RowGenerator:
    generator = RowGenerator("cpu")
    generator.manual_seed(seed)
    generator.place = place
    return generator


def randn_tensor(shape: Sequence[int], generator: Any = None, **how: Any) -> torch.Tensor:
    """diffusers' own; rows whose generators know their place have noise of their own size, and
    zeros beside it.

    Raises:
        ValueError: the shape is not that of latents on their canvas.
    """
    own = generator if isinstance(generator, list) else [generator]
    if not all(isinstance(each, RowGenerator) for each in own):
        noise: torch.Tensor = _drawn(tuple(shape), generator=generator, **how)
        return noise
    laid = [
        each.place.lay(_drawn(each.place.alone(shape), generator=each, **how))
        for _, each in zip(range(shape[0]), own, strict=True)
    ]
    return torch.cat(laid)


def draw_rows(*parts: object) -> None:
    """From now on the modules of these objects' classes draw with `randn_tensor` from here."""
    for module in _modules(parts):
        if getattr(module, "randn_tensor", None) is _drawn:
            vars(module)["randn_tensor"] = randn_tensor


own_tokens: ContextVar[Callable[[], int] | None] = ContextVar("own_tokens", default=None)
"""Gives the number of tokens of each row of the run that this is in; None where it is that of the
canvas.
"""


def shift_rows(*pipes: object) -> None:
    """From now on these pipelines shift their steps by the number of a row's own tokens."""
    for module in _modules(pipes):
        shift = vars(module).get("calculate_shift")
        if shift is not None and not hasattr(shift, "__wrapped__"):
            vars(module)["calculate_shift"] = _of_rows(shift)


def _of_rows(shift: Callable[..., float]) -> Callable[..., float]:
    @wraps(shift)
    def shifted(image_seq_len: int, *how: Any) -> float:
        own = own_tokens.get()
        return shift(image_seq_len if own is None else own(), *how)

    return shifted


def draws_otherwise(scheduler: object) -> bool:
    """Whether a scheduler has noise that does not come through `randn_tensor`."""
    other = re.compile(r"torch\.randn\(|randn_like|rand_like|BrownianTree|torch\.normal")
    return any(other.search(inspect.getsource(module)) for module in _modules([scheduler]))


def _modules(parts: Sequence[object]) -> Iterator[Any]:
    """Of diffusers, with every class that one of these derives from."""
    names = {kind.__module__: None for part in parts for kind in type(part).__mro__}
    yield from (sys.modules[name] for name in names if name.startswith("diffusers."))
