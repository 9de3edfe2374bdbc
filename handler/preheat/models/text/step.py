"""The two things that are compiled of a causal language model: the prefill of one row, a static
graph for each bucket of prompt lengths, and the decode step, one for all rows.

Both are functions of their inputs and of the cache, which they write in place and by index: at
static addresses under CUDA graphs, and without a copy of the whole cache at every step. What they
write depends on their inputs alone, so a step that is repeated, eagerly after compiled, writes the
same again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from preheat.errors import ModelError
from preheat.models.text.kv_cache import DecodeLayer, LayerShape, PrefillLayer, SlotCache

PADDING = 0
"""The token in padding and in free slots: any, since nothing reads what becomes of it."""


class Prefill(nn.Module):
    """A prompt, padded on the right to its bucket, into one row of the cache."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, tokens: torch.Tensor, last: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocabulary] after the prompt's last token.

        Args:
            tokens: [1, bucket] int64.
            last: [1] int64; the position of the last one that is no padding.
            slot: [1] int64; the row that is written.
        """
        at = torch.arange(tokens.shape[1], device=tokens.device)
        layers = [PrefillLayer(*pair, slot, at <= last) for pair in self.cache.pairs()]
        result = self.model(
            input_ids=tokens,
            attention_mask=(at[None, :] <= at[:, None])[None, None],
            position_ids=at[None],
            past_key_values=Cache(layers=layers),
            use_cache=True,
            logits_to_keep=last,
        )
        logits: torch.Tensor = result.logits[:, 0]
        return logits


class Decode(nn.Module):
    """One token of every row, free ones among them."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [slots, vocabulary] after these tokens.

        Args:
            tokens: [slots, 1] int64.
            positions: [slots] int64; of these tokens, each row's own. A row attends to what is
                written up to there.
        """
        at = torch.arange(self.cache.max_length, device=tokens.device)
        layers = [DecodeLayer(*pair, positions) for pair in self.cache.pairs()]
        result = self.model(
            input_ids=tokens,
            attention_mask=(at <= positions[:, None])[:, None, None],
            position_ids=positions[:, None],
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        logits: torch.Tensor = result.logits[:, -1]
        return logits


class SlotModel:
    """A model's slots: each free, or holding a sequence up to some position.

    Args:
        model: a causal language model of transformers.
        prefill_buckets: lengths in tokens that prompts are padded to.
        slots: sequences that are decoded together.
        max_length: tokens of a sequence, prompt included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        prefill_buckets: Sequence[int],
        slots: int,
        max_length: int,
    ) -> None:
        self.buckets, self.slots, self.max_length = sorted(prefill_buckets), slots, max_length
        self._device = model.device
        self.cache = SlotCache(layer_shapes(model), slots, max_length, model.dtype, model.device)
        self.prefill_step, self.decode_step = Prefill(model, self.cache), Decode(model, self.cache)

    def bucket(self, length: int) -> int | None:
        """The smallest that holds a prompt of this many tokens, if there is one."""
        return next((bucket for bucket in self.buckets if length <= bucket), None)

    def prefill(self, slot: int, prompt: Sequence[int]) -> torch.Tensor:
        """Logits [vocabulary], in float32 on the CPU, of what follows `prompt`, which is in this
        slot from now on.
        """
        bucket = self.bucket(len(prompt))
        assert bucket is not None, "a prompt that no bucket holds is refused when it is read"
        padded = [*prompt, *[PADDING] * (bucket - len(prompt))]
        logits = self.prefill_step(
            self._ids([padded]), self._ids([len(prompt) - 1]), self._ids([slot])
        )
        return _on_cpu(logits)[0]

    def decode(self, rows: Mapping[int, tuple[int, int]]) -> torch.Tensor:
        """Logits [slots, vocabulary], in float32 on the CPU; of slots that are not in `rows` they
        mean nothing.

        Args:
            rows: by slot, the token that is next in its sequence and that token's position.
        """
        # a free slot attends to its own first position, which its next prefill writes over
        steps = [rows.get(slot, (PADDING, 0)) for slot in range(self.slots)]
        tokens, positions = zip(*steps, strict=True)
        return _on_cpu(
            self.decode_step(self._ids([[token] for token in tokens]), self._ids(positions))
        )

    def _ids(self, numbers: Sequence[object]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """What each layer of its cache holds, as one eager token shows.

    Raises:
        ModelError: it keeps something else than keys and values of every token.
    """
    kind = type(model).__name__
    with torch.inference_mode():
        token = torch.full((1, 1), PADDING, device=model.device)
        cache = model(input_ids=token, use_cache=True).past_key_values
    if not isinstance(cache, DynamicCache):
        raise ModelError(f"{kind} keeps a {type(cache).__name__}, not keys and values of its own")
    shapes = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if layer.is_sliding or keys is None or values is None or keys.dim() != 4:
            raise ModelError(
                f"layer {index} of {kind} keeps a {type(layer).__name__}: sliding windows and "
                "recurrent states are not served"
            )
        shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
    return shapes


def _on_cpu(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(device="cpu", dtype=torch.float32)
