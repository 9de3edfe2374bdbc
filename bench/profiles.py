"""What is benched: a model, its buckets, how much traffic, and the model YAML that each strategy is
served with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from preheat.buckets import Bucket
from preheat.cli.demo import build_tiny
from preheat.errors import PreheatError
from preheat.torchserve import server

STATE = server.ROOT / ".preheat"
RESULTS = server.ROOT / "bench" / "results"
STRATEGIES = {
    "eager": "eager",
    "buckets": "buckets",
    "masked": "buckets, masked",
    "planned": "planned",
    "fixed": "fixed",
    "dynamic": "dynamic",
    "exact": "exact",
}
"""Titles, in the order in which servers start: what the others are compared with comes first.
`masked` is `buckets` with `fit: mask`, `planned` those that `preheat plan` chooses for the traffic.
"""
WITHOUT_SHAPES = ("dynamic", "exact")
"""They name no shapes to make models for, so that their engine is always torch's own compiler."""
SERVED_AS = {"eager": "exact", "masked": "buckets", "planned": "buckets"}
"""The YAML's own name of a strategy, where it is another one."""
LOAD = (
    "closed loop, one client: never more than one request under way, so batches of 1 and no queue"
)


@dataclass(frozen=True, slots=True)
class Profile:
    """One model and its traffic. Sizes in pixels."""

    name: str
    """The stem of the model YAML that the served ones are made from."""
    buckets: tuple[Bucket, ...]
    max_planned: int
    """Of the strategy `planned`: each is a cold compile."""
    canonical: Bucket
    """The one size of the strategy `fixed`."""
    num_requests: int
    num_distinct: int
    num_steps: int
    build: Callable[[Path], Path]
    """Makes the pipeline in a folder."""
    dtypes: tuple[str, ...]
    """That strategies are compared in; everything else is measured in the first one."""
    on_gpu: bool = False
    """The tiny model stays on the CPU where there is a GPU too: on one, nothing but overhead would
    be measured.
    """
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    """Those that are compared where none are named."""
    num_compared: int = 24
    """Requests of each traffic whose pictures are held against those of diffusers alone."""
    num_rounds: int = 3
    """How often each strategy is sent all requests."""
    limit_seconds: float = float("inf")
    """From the start of the run: after this no request is sent any more, so that a bench always
    ends.
    """

    @property
    def dtype(self) -> str:
        return self.dtypes[0]


def model_yaml(
    profile: Profile,
    strategy: str,
    *,
    backend: str = "inductor",
    planned: Sequence[Bucket] = (),
    dtype: str | None = None,
) -> dict[str, Any]:
    """The model YAML, as data, that `strategy` is served with.

    All are alike but for `pt2`: batches of one, text to image with guidance. `eager` is `exact`
    without the compiler: the asked sizes, rounded up to what the model needs. `exact` leaves out
    `dynamic: false`, as people do who just compile.
    """
    base: dict[str, Any] = yaml.safe_load(
        (server.ROOT / "model-config" / f"{profile.name}.yaml").read_text()
    )
    if strategy in WITHOUT_SHAPES and backend in ("auto", "openvino"):
        backend = "inductor"
    compiled: dict[str, Any] = {"enable": strategy != "eager", "backend": backend}
    if strategy not in ("eager", "exact"):
        compiled["dynamic"] = False
    buckets = {"fixed": [profile.canonical], "planned": planned}.get(strategy, profile.buckets)
    shapes = {
        "strategy": SERVED_AS.get(strategy, strategy),
        "buckets": [[bucket.height, bucket.width] for bucket in buckets],
        "batch_sizes": [1],
        "oversize": "downscale",  # a log may hold sizes that no bucket covers
        **({"fit": "mask"} if strategy == "masked" else {}),
    }
    pipeline = {
        **base["pipeline"],
        "guidance": "on",
        "tasks": ["text-to-image"],
        "dtype": dtype or profile.dtype,
    }
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        **({} if profile.on_gpu else {"deviceType": "cpu"}),
        "batchSize": 1,
        "startupTimeout": 1800,
        "responseTimeout": 900,  # `exact` compiles inside requests
        "maxRetryTimeoutInSec": 7200,
        "pt2": {"compile": compiled, "targets": ["unet"], "shapes": shapes},
        "pipeline": pipeline,
    }


def build_sdxl(size: str, folder: Path) -> Path:
    """`bench.sdxl` in a process of its own, which gives its memory back when it ends.

    Raises:
        PreheatError: this size needs a CUDA device that is not there, or it failed.
    """
    search = os.pathsep.join(
        [str(server.ROOT), str(server.ROOT / "handler"), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-m", "bench.sdxl", size, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search.rstrip(os.pathsep)},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise PreheatError(f"no SDXL of size {size} could be made: {said[-1]}")
    return folder


PROFILES: Mapping[str, Profile] = {
    "tiny": Profile(
        name="tiny-sdxl",
        buckets=(Bucket(256, 256), Bucket(320, 192), Bucket(192, 320)),
        max_planned=8,
        canonical=Bucket(256, 256),
        num_requests=150,
        num_distinct=30,
        num_steps=4,
        build=partial(build_tiny, "sdxl"),
        dtypes=("float32",),
    ),
    # Three buckets of equal area, as SDXL was trained on them: 1:1, 3:2 and 2:3.
    "small": Profile(
        name="tiny-sdxl",
        buckets=(Bucket(320, 320), Bucket(384, 256), Bucket(256, 384)),
        max_planned=5,
        canonical=Bucket(320, 320),
        num_requests=24,
        num_distinct=12,
        num_steps=8,
        build=partial(build_sdxl, "small"),
        dtypes=("float32", "bfloat16"),
        # Inductor compiles this denoiser for over a minute: `exact` in every request of a new size
        strategies=tuple(name for name in STRATEGIES if name not in WITHOUT_SHAPES),
    ),
    # Two buckets and a dozen requests: five or more cold compiles of 2.6 billion parameters have to
    # fit into ten minutes.
    "sdxl": Profile(
        name="sdxl",
        buckets=(Bucket(1152, 896), Bucket(896, 1152)),
        max_planned=2,
        canonical=Bucket(1024, 1024),
        num_requests=12,
        num_distinct=6,
        num_steps=20,
        build=partial(build_sdxl, "real"),
        dtypes=("bfloat16",),
        num_compared=2,
        num_rounds=1,
        on_gpu=True,
        limit_seconds=500,
    ),
}
