"""Rows of any sizes on one canvas: each is what it would be alone, and nothing outside matters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from masked_modules import EXAMPLES, ROWS, Example, pair
from preheat.buckets import Bucket
from preheat.errors import ConfigError
from preheat.models.diffusion import mask_check
from preheat.models.diffusion.masking.call import Call
from preheat.models.diffusion.masking.masks import Canvas, Masks
from preheat.models.diffusion.masking.parts import (
    CellAttention,
    FluxAttention,
    JointAttention,
    MaskedConv2d,
    MaskedGroupNorm,
    SelfAttention,
)
from preheat.models.diffusion.masking.place import Place
from preheat.models.diffusion.masking.rewrite import rewrite
from preheat.models.diffusion.masking.rows import Rows

MASKED = (SelfAttention, CellAttention, JointAttention, FluxAttention)


CALLED = [name for name in EXAMPLES if not name.startswith("vae")]
"""Those that run every step."""


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def _error(example: Example, untouched: nn.Module, masked: nn.Module) -> float:
    """The greatest difference between a row in company and alone; 1 is the greatest magnitude."""
    picture = example.picture()
    together = example.together(masked, picture)
    worst = 0.0
    for row in range(ROWS):
        alone = example.alone(untouched, picture, row)
        off = (example.painted(together, row) - alone).abs().max() / alone.abs().max().clamp(1)
        worst = max(worst, off.nan_to_num(torch.inf).item())
    return worst


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_is_what_the_untouched_module_gives_at_its_own_size(name: str) -> None:
    assert _error(EXAMPLES[name], *pair(name)) < 1e-5


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_sizes_it_is_the_untouched_module(name: str) -> None:
    example, picture = EXAMPLES[name], EXAMPLES[name].picture()
    results = [example.call(module, picture, slice(0, ROWS), {}) for module in pair(name)]
    assert torch.equal(*results)


def _with_outside(example: Example, picture: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Every row's own part, laid over something."""
    laid = outside.to(picture.dtype).expand_as(picture).clone()
    for row in range(ROWS):
        example.inside(laid, row).copy_(example.inside(picture, row))
    return laid


OUTSIDE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "noise x 1e3": lambda picture: 1e3 * picture.flip(0),
    "infinity": lambda picture: torch.tensor(torch.inf),
    "nan": lambda picture: torch.tensor(torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_what_lies_outside_a_row_changes_none_of_its_bits(name: str, dtype: torch.dtype) -> None:
    example, (_, masked) = EXAMPLES[name], pair(name, dtype)
    picture = example.picture(dtype)
    expected = example.together(masked, _with_outside(example, picture, torch.zeros(())))
    assert expected.isfinite().all()
    for outside in OUTSIDE.values():
        other = example.together(masked, _with_outside(example, picture, outside(picture)))
        assert torch.equal(other, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_company_of_a_row_changes_none_of_its_bits(name: str, dtype: torch.dtype) -> None:
    example, (_, masked) = EXAMPLES[name], pair(name, dtype)
    picture = example.picture(dtype)
    expected = example.together(masked, picture)
    picture[0] = torch.nan
    poisoned = example.together(masked, picture)
    assert torch.equal(poisoned[1:], expected[1:])
    assert poisoned[0].isnan().any()


@pytest.mark.parametrize("name", ["sd15, 4 levels", "sd15, scale and shift", "sd3.5", "flux"])
def test_every_mask_is_needed(name: str) -> None:
    _every_mask_is_needed(name)


@pytest.mark.parametrize("name", ["vae encoder", "vae decoder"])
def test_every_mask_of_the_vae_is_needed(name: str) -> None:
    _every_mask_is_needed(name)


def _every_mask_is_needed(name: str) -> None:
    example, (untouched, masked) = EXAMPLES[name], pair(name)
    masked, tried = copy.deepcopy(masked), list[str]()
    for part_name in _unmasked_in_turn(masked):
        assert _error(example, untouched, masked) > 2e-5, part_name
        tried.append(part_name)
    assert len(tried) > 1
    assert _error(example, untouched, masked) < 1e-5


def _unmasked_in_turn(masked: nn.Module) -> Iterator[str]:
    """Names of the parts, each while it has no mask."""
    for name, part in masked.named_modules():
        before = type(part)
        if before.__module__.endswith("masking.parts"):
            part.__class__ = before.__bases__[0]
            yield name
            part.__class__ = before
        processor = getattr(part, "processor", None)
        if isinstance(processor, MASKED):
            part.processor = _without_mask(processor)
            yield name
            part.processor = processor


def _without_mask(processor: Any) -> Any:
    if not isinstance(processor, CellAttention):
        return _Unmasked(type(processor).__bases__[0]())
    blind: Any = CellAttention(Canvas())
    blind._canvas.masks = SimpleNamespace(tokens=lambda h, w: torch.ones(1, h * w).bool())
    return blind


class _Unmasked:
    """diffusers' own processor, without the mask that it is given."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        more = {"image_rotary_emb": image_rotary_emb} if image_rotary_emb is not None else {}
        return self._processor(attn, hidden_states, encoder_hidden_states, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLED)
def test_the_check_at_load_finds_rounding_alone(name: str, dtype: torch.dtype) -> None:
    found = mask_check.difference(_call(name, dtype))
    assert found.reason is None and found.outside == 0
    assert 0 <= found.border <= found.close.share


@pytest.mark.parametrize("name", ["sdxl, 2 levels", "sd3.5", "flux"])
def test_the_check_at_load_misses_no_mask_in_half_precision(name: str) -> None:
    call = _call(name, torch.bfloat16)
    call = replace(call, module=copy.deepcopy(call.module))
    for part_name in _unmasked_in_turn(call.module):
        assert mask_check.difference(call).reason is not None, part_name
    assert mask_check.difference(call).reason is None


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e-5), (torch.float16, 0.018)])
def test_the_check_at_load_sees_what_rounding_hides_but_for_the_border(
    dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where zeros are counted on there is something, always the same, and little."""
    call = _call("sdxl, 2 levels", dtype)
    close = mask_check.difference(call).close
    normed = MaskedGroupNorm.forward

    def shifted(self: MaskedGroupNorm, input: torch.Tensor) -> torch.Tensor:
        result = normed(self, input)
        if self.canvas.masks is None:
            return result
        cells, _ = self.canvas.masks.at(input.shape[-2], input.shape[-1])
        return torch.where(cells, result, value)

    monkeypatch.setattr(MaskedGroupNorm, "forward", shifted)
    found = mask_check.difference(call)
    assert found.outside == 0 and found.close.ok and found.close.share > close.share
    assert found.reason is not None and "border" in found.reason


def test_what_every_step_is_told_is_made_once_a_run() -> None:
    rows = Rows([Bucket(16, 32), Bucket(32, 32)], Bucket(32, 64), 8)
    like = torch.zeros(4, 6)
    sizes, ids = rows.sizes(4, like.device), rows.time_ids(like)
    assert sizes.tolist() == [[2, 4], [4, 4]] * 2
    assert ids.tolist() == [[16, 32, 0, 0, 16, 32], [32, 32, 0, 0, 32, 32]] * 2
    assert rows.sizes(4, like.device) is sizes and rows.time_ids(like) is ids
    assert len(rows.sizes(2, like.device)) == 2 and rows.time_ids(like.half()).dtype == torch.half


class _Called(Exception):
    """With what a module was called."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


def _call(name: str, dtype: torch.dtype) -> Call:
    """Of the masked denoiser, for two rows of one size, as pipelines call it."""
    example, (_, module) = EXAMPLES[name], pair(name, dtype)
    place = Place(example.sizes[1], example.canvas)

    def seen(*args: Any, **kwargs: Any) -> None:
        raise _Called(args, kwargs)

    with pytest.raises(_Called) as called, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "forward", seen)
        sizes = torch.tensor([place.cells] * 2)
        example.call(module, example.picture(dtype)[:2], slice(0, 2), {"sizes": sizes})
    args, kwargs = called.value.args, called.value.kwargs
    if not isinstance(module, UNet2DConditionModel):
        kwargs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        args = ()
    return Call(module, args, kwargs, place)


def _canvas(sizes: list[tuple[int, int]], height: int, width: int) -> Canvas:
    canvas = Canvas()
    canvas.masks = Masks(torch.tensor(sizes), height, width)
    return canvas


def test_a_norm_far_from_zero_keeps_its_digits() -> None:
    """Where the mean is a thousand times the deviation, a difference of sums would have none."""
    norm = MaskedGroupNorm(2, 4)
    norm.canvas = _canvas([(3, 5), (8, 8)], 8, 8)
    values = 1000 + torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    normed = norm(values)
    exact = nn.functional.group_norm(values[:1, :, :3, :5].double(), 2)
    assert (normed[:1, :, :3, :5] - exact).abs().max() < 1e-3
    assert not normed[0, :, 3:].any()


@pytest.mark.parametrize("made", [MaskedGroupNorm(2, 4), MaskedConv2d(4, 2, 3, padding=1)])
def test_a_part_reads_nothing_outside(made: Any) -> None:
    made.canvas = _canvas([(3, 5), (8, 8)], 8, 8)
    values = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = made(values)[:, :, :3, :5]
    values[0, :, 3:], values[0, :, :, 5:] = torch.nan, torch.inf
    assert torch.equal(made(values)[:, :, :3, :5], expected)


@pytest.mark.parametrize("name", ["sd15, 4 levels", "sd3", "flux"])
def test_an_attention_reads_nothing_outside(name: str) -> None:
    """Where a masked key is NaN, the mask alone would not help."""
    _, masked = pair(name)
    attn: Any = next(m for m in masked.modules() if isinstance(getattr(m, "processor", 0), MASKED))
    states = torch.randn(2, 6, attn.to_q.in_features)
    own = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    text = None if name.startswith("sd15") else torch.randn(2, 3, attn.add_k_proj.in_features)
    mask = {"sd15, 4 levels": own[:, None], "sd3": own}.get(name)
    if mask is None:
        mask = torch.cat([own.new_ones(2, 3), own], dim=1)[:, None, None]

    def attended() -> torch.Tensor:
        result = attn(states, encoder_hidden_states=text, attention_mask=mask)
        painted: torch.Tensor = result if text is None else result[0]
        return painted[:, :4]

    expected = attended()
    states[0, 4:] = torch.nan
    assert torch.equal(attended(), expected)


class _Blurred(nn.Conv2d):
    """Anything may be in a subclass."""


def _unet() -> Any:
    return copy.deepcopy(pair("sdxl, 2 levels")[0])


def _with_a_subclass(unet: Any) -> str:
    unet.down_blocks[0].resnets[0].conv1.__class__ = _Blurred
    return "down_blocks.0.resnets.0.conv1 (_Blurred)"


def _with_circular_borders(unet: Any) -> str:
    unet.conv_in.padding_mode = "circular"
    return "conv_in (Conv2d, stride (1, 1), padding circular)"


def _with_other_processors(unet: Any) -> str:
    unet.fuse_qkv_projections()
    return "transformer_blocks.0 (BasicTransformerBlock, another attention processor)"


@pytest.mark.parametrize(
    "change", [_with_a_subclass, _with_circular_borders, _with_other_processors]
)
def test_what_is_not_known_is_refused_by_name(change: Callable[[Any], str]) -> None:
    unet = _unet()
    part = change(unet)
    kinds = [type(each) for each in unet.modules()]
    with pytest.raises(ConfigError, match=r"cannot be had for unet") as refused:
        rewrite(unet, "unet")
    assert part in str(refused.value)
    assert refused.value.path == "pt2.shapes.fit"
    assert [type(each) for each in unet.modules()] == kinds


def test_a_rewritten_module_is_still_of_its_class_with_its_weights() -> None:
    untouched, masked = pair("sdxl, 2 levels")
    assert isinstance(masked, UNet2DConditionModel)
    assert masked.state_dict().keys() == untouched.state_dict().keys()
