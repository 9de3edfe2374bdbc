"""The VAE row by row: every picture in a bucket that was warmed, and none in another's way."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from preheat.buckets import Bucket
from preheat.models.diffusion.masking.place import Place
from preheat.models.diffusion.masking.row_vae import RowVae
from preheat.models.diffusion.masking.seats import Seat, VaeBuckets
from preheat.models.diffusion.variants import Variant, covering, plan_variants, seated

CELL = 4
CANVAS = Bucket(32, 36)
SIZES = [Bucket(32, 36), Bucket(12, 20), Bucket(4, 8), Bucket(28, 4)]
SIDES = st.integers(1, 6).map(lambda number: 8 * number)
SOME = st.lists(st.builds(Bucket, SIDES, SIDES), min_size=1, max_size=4, unique=True)


@given(SOME, SOME, st.booleans(), st.sampled_from([8, 16]))
def test_every_picture_has_a_seat_that_warm_up_meets(
    buckets: list[Bucket], sizes: list[Bucket], mask_only: bool, multiple: int
) -> None:
    vae = VaeBuckets(tuple(sizes), mask_only)
    known = vae.seats(buckets, multiple)
    met = set()
    for bucket in buckets:
        sides = (range(multiple, side + 1, multiple) for side in (bucket.height, bucket.width))
        met |= {vae.seat(Bucket(*picture)) for picture in product(*sides)}
    assert met - {None} == known.keys()
    for seat, picture in known.items():
        assert vae.seat(picture) == seat
        assert any(bucket.covers(picture) for bucket in buckets)


def test_warm_up_has_one_run_more_for_a_seat_that_it_would_not_meet() -> None:
    """A picture one row of cells less high than 64x64 fills the other bucket."""
    buckets = [Bucket(64, 64), Bucket(56, 64)]
    tasks = ["text-to-image", "inpainting"]
    known = plan_variants(buckets, [1, 4], [True, False], tasks, [True, False])
    vae = VaeBuckets(tuple(buckets), mask_only=False)
    every = seated([_smaller(each) if each.masked else each for each in known], vae, 8)
    (more,) = (each for each in every if each.painted == Bucket(64, 56))
    assert more.seat == Seat(Bucket(64, 64), masked=True)
    assert (more.bucket, more.batch_size, more.task) == (Bucket(64, 64), 1, "inpainting")
    assert {each.seat for each in every} == {
        Seat(bucket, masked) for bucket in buckets for masked in (True, False)
    }
    assert [each.bucket for each in every] == sorted(
        (each.bucket for each in every), key=lambda bucket: -bucket.volume
    )
    assert every[-1] == replace(known[-1], seat=Seat(Bucket(56, 64), masked=False))
    assert more in covering(every)


def _smaller(variant: Variant) -> Variant:
    bucket = variant.bucket
    return replace(variant, painted=Bucket(bucket.height - 8, bucket.width))


@pytest.fixture(scope="module")
def vaes() -> tuple[Any, Any, RowVae]:
    """The VAE untouched, the same one behind a RowVae, and that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untouched: Any = AutoencoderKL(
            block_out_channels=(4, 8, 8),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            norm_num_groups=2,
        )
    untouched.eval().requires_grad_(False)
    vae: Any = AutoencoderKL.from_config(untouched.config).eval().requires_grad_(False)
    vae.load_state_dict(untouched.state_dict())
    buckets = VaeBuckets((Bucket(36, 36), Bucket(16, 20), Bucket(4, 8)), mask_only=False)
    pipe = SimpleNamespace(vae=vae)
    return untouched, vae, RowVae([pipe], CELL, ["decoder", "encoder"], buckets, [CANVAS])


def _places() -> list[Place]:
    canvas = (CANVAS.height // CELL, CANVAS.width // CELL)
    return [Place((size.height // CELL, size.width // CELL), canvas) for size in SIZES]


@pytest.mark.parametrize("part", ["decode", "encode"])
def test_a_row_is_what_the_vae_gives_it_alone_whatever_lies_beside(part: str, vaes: Any) -> None:
    untouched, vae, rows = vaes
    before, after, channels = (1, CELL, 4) if part == "decode" else (CELL, 1, 3)
    given = torch.randn(
        len(SIZES), channels, CANVAS.height // CELL * before, CANVAS.width // CELL * before
    )

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        (made,) = getattr(vae, part)(tensor, return_dict=False)
        return getattr(made, "parameters", made)  # type: ignore[no-any-return]

    with torch.no_grad(), rows.of(_places()):
        expected = whole(given)
        spoiled = torch.full_like(given, torch.nan)
        spoiled[1::2] = 1e3
        for index in range(len(SIZES)):
            place = _places()[index]
            own = place.times(before).cut(given[index : index + 1])
            alone = getattr(untouched, part)(own, return_dict=False)[0]
            alone = getattr(alone, "parameters", alone)
            found = place.times(after).cut(expected[index : index + 1])
            assert (found - alone).abs().max() < 1e-5
            other = spoiled.clone()
            place.times(before).cut(other[index : index + 1]).copy_(own)
            assert torch.equal(whole(other)[index], expected[index])
            laid = place.times(after).lay(place.times(after).cut(expected[index : index + 1]))
            assert torch.equal(laid[0], expected[index])


def test_rows_that_fill_a_known_canvas_lie_in_buckets_too_and_others_are_diffusers_own(
    vaes: Any,
) -> None:
    """What is generated at a size of its own meets nothing that was compiled."""
    untouched, vae, _ = vaes
    seen: list[tuple[int, ...]] = []
    hook = vae.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args[0].shape[-2:], len(kwargs))), with_kwargs=True
    )
    with torch.no_grad():
        for height, width in ((8, 9), (8, 7)):
            latents = torch.randn(1, 4, height, width)
            alone = untouched.decode(latents).sample
            assert (vae.decode(latents).sample - alone).abs().max() < 1e-5
    hook.remove()
    assert seen == [(9, 9, 1), (8, 7, 0)]
