"""A short `make test-fit` inside this process, without TorchServe."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.plain_diffusers import Plain
from fit import GRID, SCHEDULERS, Tally, build, model_config, random_request
from preheat.config.model import ModelConfig
from preheat.models.diffusion.job import Answer
from preheat.status import StatusFile
from preheat.worker.worker import Worker

COUNT = 20
"""Requests a family."""


def served(folder: Path, config: dict[str, Any], requests: list[Any]) -> list[Answer]:
    """What a worker of this folder answers, in batches of four."""
    parsed = ModelConfig.parse(config)
    cpu, status = torch.device("cpu"), StatusFile(None, "tiny")
    with Worker[Any, Any](parsed, folder, cpu, status=status) as worker:
        jobs = [worker.parse({"body": dict(request)}) for request in requests]
        answers = [
            answer
            for start in range(0, len(jobs), 4)
            for answer in worker.run(jobs[start : start + 4])
        ]
    for answer in answers:
        answer.raise_if_failed()
    return answers


def compared(family: str, scheduler: str, fit: str, folder: Path) -> Tally:
    """Of as many requests as are this scheduler's part."""
    rng, tally = random.Random(f"{family} {scheduler}"), Tally()
    number = -(-COUNT // len(SCHEDULERS[family]))
    requests = [random_request(rng, family, scheduler) for _ in range(number)]
    build(family, scheduler, folder)
    plain, config = (
        Plain(folder, GRID[family]),
        model_config(family, scheduler, fit=fit, backend=None),
    )
    answers = served(folder, config, requests)
    for request, answer in zip(requests, answers, strict=True):
        tally.compare(request, np.asarray(answer.pictures[0]), plain.picture(request))
    return tally


@pytest.mark.parametrize(
    ("family", "scheduler"), [(each, name) for each, own in SCHEDULERS.items() for name in own]
)
def test_every_picture_is_the_one_that_diffusers_paints(
    family: str, scheduler: str, tmp_path: Path
) -> None:
    tally = compared(family, scheduler, "mask", tmp_path)
    assert tally.num_pictures >= 4 and not tally.findings


def test_padding_paints_other_pictures(tmp_path: Path) -> None:
    """So the test above can fail."""
    tally = compared("sdxl", "EulerDiscreteScheduler", "pad", tmp_path)
    assert len(tally.findings) >= 3
