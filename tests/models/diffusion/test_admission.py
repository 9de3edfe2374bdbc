from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.diffusion.test_engine import make_request
from preheat.buckets import Bucket
from preheat.errors import RequestError
from preheat.models.diffusion.admission import check_cost


@given(st.integers(1, 100), st.integers(1, 4), st.integers(1, 64), st.integers(1, 10**6))
def test_the_limit_is_met_to_the_pixel_step(
    steps: int, num_images: int, side: int, max_cost: int
) -> None:
    request = make_request(num_inference_steps=steps, num_images=num_images)
    bucket = Bucket(8 * side, 8)
    fits = bucket.volume * steps * num_images <= max_cost
    try:
        check_cost(request, bucket, steps=steps, least_area=64, max_cost=max_cost)
    except RequestError as error:
        assert not fits and error.code == 400 and str(max_cost) in error.message
    else:
        assert fits
    check_cost(request, bucket, steps=steps, least_area=64, max_cost=None)


@pytest.mark.parametrize(
    ("asked", "bucket", "at_fault"),
    [
        ({"num_inference_steps": 9, "num_images": 2}, Bucket(64, 64), "num_inference_steps"),
        ({"num_inference_steps": 2, "num_images": 3}, Bucket(64, 64), "num_images"),
        ({"num_inference_steps": 2, "num_images": 2}, Bucket(64, 640), "height"),
    ],
)
def test_the_factor_that_weighs_most_is_at_fault(
    asked: dict[str, int], bucket: Bucket, at_fault: str
) -> None:
    with pytest.raises(RequestError) as caught:
        request = make_request(**asked)
        check_cost(request, bucket, steps=request.num_run_steps, least_area=64 * 64, max_cost=1)
    assert caught.value.field == at_fault


def test_an_image_costs_the_steps_that_are_left_of_its_way() -> None:
    assert make_request(num_inference_steps=10, strength=0.35).num_run_steps == 10
    assert make_request(num_inference_steps=10, strength=0.35, image=b"i").num_run_steps == 3
