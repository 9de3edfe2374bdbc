from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from models.diffusion.fakes import FakePipeline, config
from preheat.buckets import Bucket
from preheat.compilation.warmup_plan import served_sizes
from preheat.config.pt2 import ShapesConfig
from preheat.errors import DeadlinePassed, OutOfMemory, PipelineFailure, RequestError
from preheat.models.batching import Execution, RunReport
from preheat.models.diffusion.job import Answer, Job
from preheat.models.diffusion.pipeline import AfterStep, Batch, Generated
from preheat.models.diffusion.request import ImageRequest
from preheat.models.diffusion.runner import DiffusionRunner

BUCKETS = (Bucket(64, 64), Bucket(96, 48), Bucket(48, 96))


class Canvas(FakePipeline):
    """Paints every pixel from its place and its row's seed, so that a picture shows where and whose
    it is.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.most_rows = 1000
        self.checks = False

    def generate(self, batch: Batch, after_step: AfterStep) -> Generated:
        """Cells of 8x8 pixels show the seed before the picture does. Memory is short in the last
        step only.
        """
        self.batches.append(batch)
        for number in range(1, batch.num_inference_steps + 1):
            after_step(number, batch.num_inference_steps, lambda row: _cells(batch, row))
        if any(row.prompt == "explode" for row in batch.rows):
            raise ArithmeticError("boom")
        if len(batch.rows) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        y, x = np.mgrid[: batch.bucket.height, : batch.bucket.width]
        rows = [np.stack([y, x, np.full_like(x, row.seed % 251)], axis=-1) for row in batch.rows]
        flagged = [row.prompt == "nude" for row in batch.rows] if self.checks else None
        return Generated(np.stack(rows).astype(np.uint8), flagged)


def _cells(batch: Batch, row: int) -> NDArray[np.uint8]:
    return np.full(
        (batch.bucket.height // 8, batch.bucket.width // 8, 3), batch.rows[row].seed % 251, np.uint8
    )


def make_request(**changes: Any) -> ImageRequest:
    values: dict[str, Any] = {
        "prompt": "a",
        "negative_prompt": None,
        "height": 40,
        "width": 40,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "seed": 7,
        "image": None,
        "mask_image": None,
        "strength": 1.0,
        "num_images": 1,
        "output_format": "png",
        "response_format": "image",
    }
    return ImageRequest(**(values | changes))


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), "white").save(buffer, "png")
    return buffer.getvalue()


class Bench:
    def __init__(self, *, keep_unmasked: bool = False, **shapes: Any) -> None:
        self.canvas, self.reports = Canvas(), list[RunReport]()
        resolved = ShapesConfig.model_validate(
            {"buckets": BUCKETS, "batch_sizes": (1, 2, 4)} | shapes
        )
        execution = Execution(
            served_sizes(resolved, 4), torch.device("cpu"), report=self.reports.append
        )
        own = config(resolved, 4, min_side=1, keep_unmasked=keep_unmasked)
        self.runner = DiffusionRunner(execution, self.canvas, own)

    def job(self, **changes: Any) -> Job:
        return self.runner.planner.prepare(make_request(**changes))

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        return self.runner.inference(jobs)


REQUESTS = st.fixed_dictionaries(
    {
        "height": st.integers(1, 64),
        "width": st.integers(1, 48),
        "seed": st.integers(0, 250),
        "num_inference_steps": st.integers(1, 2),
        "guidance_scale": st.sampled_from([0.0, 5.0]),
        "negative_prompt": st.sampled_from([None, "b"]),
        "num_images": st.integers(1, 3),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=8))
def test_everybody_gets_their_own_pictures_in_order_at_their_size_whatever_the_company(
    wishes: list[dict[str, Any]],
) -> None:
    bench = Bench()
    jobs = [bench.job(**wish) for wish in wishes]
    for wish, job, answer in zip(wishes, jobs, bench.run(jobs), strict=True):
        assert answer.error is None and len(answer.pictures) == wish["num_images"]
        for index, picture in enumerate(answer.pictures):
            assert picture.size == (wish["width"], wish["height"])
            top, left = job.plan.crop.top, job.plan.crop.left
            assert picture.getpixel((0, 0)) == (top, left, (wish["seed"] + index) % 251)


@settings(max_examples=100, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=8))
def test_a_run_mixes_nothing_that_must_agree_and_always_has_a_warmed_size(
    wishes: list[dict[str, Any]],
) -> None:
    bench = Bench()
    bench.run([bench.job(**wish) for wish in wishes])
    for batch, report in zip(bench.canvas.batches, bench.reports, strict=True):
        assert len(batch.rows) in (1, 2, 4) and report.num_real_rows <= len(batch.rows)
        assert len({row.negative_prompt is None for row in batch.rows}) == 1
    assert sum(report.num_real_rows for report in bench.reports) == sum(
        wish["num_images"] for wish in wishes
    )


def test_requests_that_agree_share_a_run_and_filler_rows_carry_nobodys_text() -> None:
    bench = Bench(batch_sizes=(4,))
    bench.run([bench.job(prompt="secret", seed=seed) for seed in range(3)])
    (batch,) = bench.canvas.batches
    assert [row.prompt for row in batch.rows] == ["secret"] * 3 + [""]
    assert bench.reports[0].num_real_rows == 3


def test_with_dynamic_batch_sizes_nothing_is_filled_up() -> None:
    bench = Bench(batch_sizes="dynamic")
    bench.run([bench.job(seed=seed) for seed in range(7)])
    assert [len(batch.rows) for batch in bench.canvas.batches] == [4, 3]


def test_a_group_that_fails_takes_only_its_own_requests_with_it() -> None:
    bench = Bench()
    answers = bench.run(
        [bench.job(), bench.job(prompt="explode", num_inference_steps=1), bench.job(seed=8)]
    )
    assert [type(answer.error) for answer in answers] == [type(None), PipelineFailure, type(None)]
    assert all(answer.pictures for answer in (answers[0], answers[2]))


def test_who_makes_a_run_fail_fails_alone_but_not_in_warm_up() -> None:
    bench = Bench()
    jobs = [bench.job(seed=1), bench.job(prompt="explode", seed=2), bench.job(seed=3, num_images=3)]
    answers = bench.run(jobs)
    assert [type(answer.error) for answer in answers] == [type(None), PipelineFailure, type(None)]
    assert [len(answer.pictures) for answer in answers] == [1, 0, 3]
    assert all(answer.error is not None for answer in bench.runner.batches.run(jobs, retry=False))


@pytest.mark.parametrize(("most_rows", "runs"), [(3, [4, 2, 2]), (1, [4, 2, 1, 1, 1, 1])])
def test_a_run_out_of_memory_is_split_down_to_one_and_everybody_is_served(
    most_rows: int, runs: list[int]
) -> None:
    bench = Bench()
    bench.canvas.most_rows = most_rows
    answers = bench.run([bench.job(seed=seed) for seed in range(4)])
    assert [len(batch.rows) for batch in bench.canvas.batches] == runs
    tops = [answer.job.plan.crop for answer in answers]
    assert [answer.pictures[0].getpixel((0, 0)) for answer in answers] == [
        (crop.top, crop.left, seed) for seed, crop in enumerate(tops)
    ]


def test_what_does_not_fit_alone_is_a_507_and_its_neighbours_live() -> None:
    bench = Bench()
    bench.canvas.most_rows = 0
    (answer,) = bench.run([bench.job()])
    assert (
        isinstance(answer.error, OutOfMemory) and answer.error.code == 507 and not answer.pictures
    )
    bench.canvas.most_rows = 1000
    assert bench.run([bench.job()])[0].error is None


def test_a_request_whose_deadline_has_passed_is_not_painted() -> None:
    bench = Bench()
    late, punctual = (replace(bench.job(seed=1), deadline=deadline) for deadline in (1.0, 1e12))
    answers = bench.run([late, punctual])
    assert isinstance(answers[0].error, DeadlinePassed) and answers[0].error.code == 504
    assert answers[1].error is None and [len(batch.rows) for batch in bench.canvas.batches] == [1]


def test_the_image_sets_the_size_that_the_request_leaves_out() -> None:
    job = Bench().job(image=png(33, 21), height=None, width=None)
    assert (job.plan.height, job.plan.width) == (21, 33)
    assert job.image is not None and job.image.size == (
        job.plan.bucket.width,
        job.plan.bucket.height,
    )
    assert (job.plan.crop.top, job.plan.crop.left) == (0, 0)


def test_one_side_alone_keeps_the_images_proportions() -> None:
    job = Bench().job(image=png(40, 20), height=None, width=60)
    assert (job.plan.height, job.plan.width) == (30, 60)


def test_an_image_cannot_bring_in_a_size_that_a_request_could_not_ask_for() -> None:
    bench = Bench(oversize="eager")
    with pytest.raises(RequestError) as caught:
        bench.job(image=png(5000, 10), height=None, width=None)
    assert caught.value.field == "width"


def test_without_image_and_size_the_first_bucket_is_the_size() -> None:
    job = Bench().job(height=None, width=None)
    assert (job.plan.height, job.plan.width, job.plan.padding) == (64, 64, 0.0)


def test_a_mask_is_laid_like_its_image() -> None:
    job = Bench().job(image=png(40, 40), mask_image=png(20, 20, "L"), seed=1)
    assert job.mask is not None and job.image is not None and job.mask.size == job.image.size
    assert job.request.task == "inpainting"


def test_oversize_follows_the_policy() -> None:
    with pytest.raises(RequestError):
        Bench().job(height=100, width=100)
    eager = Bench(oversize="eager").job(height=100, width=100)
    assert eager.bypass and eager.plan.bucket == Bucket(104, 104)
    bounded = Bench(oversize="eager")
    bounded.canvas.most_side = 96
    with pytest.raises(RequestError, match="would be 104 pixels; this model has positions for 96"):
        bounded.job(height=100, width=40)
    downscaled = Bench(oversize="downscale").job(height=200, width=100)
    assert downscaled.plan.bucket == Bucket(96, 48) and downscaled.plan.resampled


def test_the_smallest_that_is_watched_has_masks_where_a_bucket_of_one_cell_has_none() -> None:
    bench = Bench(fit="mask", batch_sizes="dynamic", buckets=(Bucket(64, 64), Bucket(8, 8)))
    smallest = bench.runner.extremes(bench.runner.variants((1, 4)))
    assert {variant.bucket for variant in smallest} == {Bucket(64, 64)}
    assert all(variant.masked for variant in smallest)


def test_what_was_computed_and_cut_off_is_counted_at_the_scale_of_the_answer() -> None:
    bench = Bench(fit="mask", oversize="downscale", batch_sizes=(1,))
    jobs = [bench.job(height=height, width=width) for height, width in ((40, 40), (200, 150))]
    small, enlarged = bench.run(jobs)
    assert (small.num_computed, small.num_padding) == (64 * 64, 64 * 64 - 40 * 40)
    # 64x48 of 64x64, which then is 200x200
    assert (enlarged.num_computed, enlarged.num_padding) == (200 * 200, 200 * 50)


def test_exact_and_dynamic_paint_the_asked_size_rounded_to_the_models_grid() -> None:
    assert Bench(strategy="exact").job(height=41, width=90).plan.bucket == Bucket(48, 96)
    assert Bench(strategy="dynamic").job(height=20, width=41).plan.bucket == Bucket(32, 48)
    with pytest.raises(RequestError):
        Bench(strategy="dynamic").job(height=90, width=90)
    # half of a bucket is at least two grid cells a side, which may be more than it has
    low = Bench(strategy="dynamic", buckets=(Bucket(24, 96),)).runner
    assert {variant.bucket for variant in low.between(low.variants((1,)))} == {Bucket(24, 96)}


def test_each_picture_keeps_its_own_flag_through_splits_and_fillers() -> None:
    bench = Bench(batch_sizes=(1, 4))
    bench.canvas.checks, bench.canvas.most_rows = True, 3
    wishes = [
        {"prompt": prompt, "num_images": 3, "response_format": "b64_json"}
        for prompt in ("nude", "a", "nude")
    ]
    answers = bench.run([bench.job(**wish) for wish in wishes])
    assert [answer.flagged for answer in answers] == [[True] * 3, [False] * 3, [True] * 3]
    assert [answer.num_flagged for answer in answers] == [3, 0, 3]


def half_masked(prompt: str, seed: int) -> dict[str, Any]:
    """A picture of noise whose left half is to stay: 127 in the mask, and 128 in the right one."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    mask = np.full((40, 40), 127, np.uint8)
    mask[:, 20:] = 128
    files = []
    for pixels in (noise, mask):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        files.append(buffer.getvalue())
    return {"prompt": prompt, "seed": seed, "image": files[0], "mask_image": files[1]}


@pytest.mark.parametrize("fit", ["pad", "resize", "mask"])
def test_what_is_outside_the_mask_is_kept_to_the_bit_where_that_is_asked_for(fit: str) -> None:
    wishes = [half_masked("a", 1), half_masked("nude", 2)]
    kept, plain = (Bench(keep_unmasked=keep, fit=fit) for keep in (True, False))
    kept.canvas.checks = plain.canvas.checks = True
    answers = [bench.run([bench.job(**wish) for wish in wishes]) for bench in (kept, plain)]
    (own, blackened), (painted, painted_black) = (
        [np.asarray(answer.pictures[0]) for answer in each] for each in answers
    )
    sent = np.asarray(Image.open(io.BytesIO(wishes[0]["image"])))
    assert np.array_equal(own[:, :20], sent[:, :20])
    assert np.array_equal(own[:, 20:], painted[:, 20:])
    assert not np.array_equal(painted[:, :20], sent[:, :20])
    # what the safety checker has refused shows nothing of the picture it was made from
    assert np.array_equal(blackened, painted_black)


def test_a_run_that_fails_leaves_no_flag_behind() -> None:
    bench = Bench(batch_sizes=(2,))
    bench.canvas.checks = True
    answers = bench.run([bench.job(prompt=prompt) for prompt in ("nude", "explode", "a")])
    assert [answer.flagged for answer in answers] == [[True], [], [False]]


def test_a_panic_of_a_library_in_rust_fails_its_request_alone() -> None:
    bench = Bench()
    with patch.object(bench.canvas, "generate", side_effect=_panic):
        (answer,) = bench.run([bench.job()])
    assert isinstance(answer.error, PipelineFailure)
    with (
        patch.object(bench.canvas, "generate", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        bench.run([bench.job()])


def _panic(*_: object) -> None:
    from tokenizers import NormalizedString

    NormalizedString("a").filter(lambda _: 1 / 0)  # what filter gives may not raise: Rust panics
