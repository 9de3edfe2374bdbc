"""What counts as equal but for rounding, of compiled code and of padding."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preheat.compilation.closeness import COMPILED, PADDED, Tolerance, compare, mismatch

NUMBERS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8)


@given(NUMBERS, st.sampled_from([COMPILED, PADDED]))
def test_a_result_is_close_to_itself(numbers: list[float], tolerance: Tolerance) -> None:
    tensor = torch.tensor([*numbers, math.inf])
    close = compare(tensor, tensor, tolerance)
    assert (close.max_error, close.share, close.ok) == (0.0, 0.0, True)


@given(NUMBERS, st.sampled_from([0.5, 2.0]))
def test_the_tolerance_is_a_share_of_the_largest_magnitude(
    numbers: list[float], factor: float
) -> None:
    expected = torch.tensor([*numbers, 1e3])
    error = 1e3 * COMPILED.shares[torch.float32] * factor
    close = compare(expected + torch.tensor(error), expected)
    assert close.ok is (factor < 1) and close.share == pytest.approx(close.max_error / 1e3)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("tolerance", [COMPILED, PADDED])
def test_what_is_not_finite_on_one_side_is_never_close(odd: float, tolerance: Tolerance) -> None:
    whole, broken = torch.ones(3), torch.tensor([1.0, odd, 1.0])
    assert not compare(broken, whole, tolerance).ok and not compare(whole, broken, tolerance).ok


def test_small_numbers_are_measured_by_themselves_in_compiled_code_alone() -> None:
    expected = torch.full((2,), 1e-6)
    assert not compare(expected * 1.1, expected, COMPILED).ok
    assert compare(expected * 1.1, expected, PADDED).ok
    assert not compare(torch.ones(2), torch.zeros(2), COMPILED).ok


def test_whole_numbers_and_nothing_have_no_rounding() -> None:
    assert not compare(torch.tensor([100001]), torch.tensor([100000])).ok
    assert compare(torch.ones(0), torch.ones(0)).ok


def test_a_module_in_half_precision_may_answer_in_float32() -> None:
    expected = torch.ones(2)
    assert not compare(expected * 1.02, expected, PADDED).ok
    assert compare(expected * 1.02, expected, PADDED, torch.bfloat16).ok


def test_nan_is_no_small_difference() -> None:
    whole, broken = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert mismatch((whole,), (whole,)) is None
    assert "differs" in str(mismatch((broken,), (whole,)))
    assert "returns" in str(mismatch((whole[:2],), (whole,))) and "returns" in str(
        mismatch((), (whole,))
    )


def test_what_is_let_through_says_how_far_it_is_off(caplog: pytest.LogCaptureFixture) -> None:
    theirs, name = torch.ones(4, dtype=torch.bfloat16), "unet-0.pt2"
    with caplog.at_level(logging.INFO):
        assert mismatch((theirs * 1.0625, torch.ones(2)), (theirs, torch.ones(2)), name) is None
    assert caplog.messages == [
        f"{name}: differs from eager by 0.062 of the largest magnitude; 0.08 is let through"
    ]
    caplog.clear()
    assert (
        mismatch((theirs * 1.5,), (theirs,), name) is not None
        and mismatch((theirs,), (theirs,)) is None
    )
    assert not caplog.messages
