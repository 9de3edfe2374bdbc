"""Keys and values of the sequences that are decoded together, in fixed memory, each row at a
position of its own.

transformers' StaticCache counts one position for the whole batch (`StaticLayer.cumulative_length`
in transformers/cache_utils.py), so its rows go in lockstep; here a row is a slot that a sequence
takes and leaves while others are in the middle of theirs. The layers keep transformers' cache
interface, and nothing but buffers outlives a step: they are made inside it, around the buffers.

A mask does not stop NaN: zero times NaN is NaN. So what a row could read of others' or of padding
is written over: a prefill writes its whole row, zeros where there is no token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

LayerShape: TypeAlias = tuple[int, int, int]
"""Heads, and the sizes of a key and of a value in each."""


class SlotCache(nn.Module):
    """The buffers, [slots, heads, max_length, dim] for each layer's keys and values. They are
    buffers of a module so that CUDA graphs find them at one address.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.slots, self.max_length, self.num_layers = slots, max_length, len(layers)
        for index, (heads, *sizes) in enumerate(layers):
            for name, size in zip(("keys", "values"), sizes, strict=True):
                buffer = torch.zeros(slots, heads, max_length, size, dtype=dtype, device=device)
                self.register_buffer(f"{name}_{index}", buffer, persistent=False)

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values, layer by layer; not by get_buffer, which not every Dynamo traces."""
        return [
            (getattr(self, f"keys_{index}"), getattr(self, f"values_{index}"))
            for index in range(self.num_layers)
        ]

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())


class _Layer(CacheLayerMixin):
    """What transformers asks of a cache layer, but for `update`, on buffers that are never
    reallocated. Positions and masks are passed to the model, so none of its questions about them
    is asked.
    """

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("the buffers are there from the beginning")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise AssertionError("the mask is passed to the model")

    def get_seq_length(self) -> int:
        raise AssertionError("positions are passed to the model, one for each row")

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class PrefillLayer(_Layer):
    """Writes one row, whole, and attends to the prompt alone.

    Args:
        slot: which row, [1] int64.
        real: [length] bool; which of the prompt's tokens are no padding.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor, real: torch.Tensor
    ) -> None:
        super().__init__(keys, values)
        self._slot, self._real = slot, real[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [1, heads, length, dim], as are the results."""
        states = []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            kept = torch.where(self._real, new, 0)
            row = functional.pad(kept, (0, 0, 0, buffer.shape[2] - kept.shape[2]))
            buffer.index_copy_(0, self._slot, row)
            states.append(kept)
        return states[0], states[1]


class DecodeLayer(_Layer):
    """Writes one token of every row at that row's position, and attends to the whole buffers.

    Args:
        positions: [slots] int64, of the tokens that are written.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__(keys, values)
        self._positions = positions
        self._rows = torch.arange(keys.shape[0], device=keys.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [slots, heads, 1, dim]; the results are the buffers."""
        self.keys[self._rows, :, self._positions] = key_states[:, :, 0]
        self.values[self._rows, :, self._positions] = value_states[:, :, 0]
        return self.keys, self.values
