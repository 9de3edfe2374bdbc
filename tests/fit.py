"""Ask a running server for pictures of all sizes and compare each with what diffusers alone paints.

    make test-fit FIT_OPTIONS="--family sdxl --count 200 --seed 1 --clients 8"

Starts a TorchServe for each family and scheduler, with a tiny model. The requests follow from the
seed alone; `--fit pad` must fail.
"""

from __future__ import annotations

import json
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import typer
import yaml
from diffusers import AutoPipelineForText2Image
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from bench.plain_diffusers import Plain
from preheat.models import tiny
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client
from served import Served, noise, opened, serving

STATE = server.ROOT / ".preheat"
GRID = {"sdxl": 8, "sd15": 8, "sd3": 16, "flux": 16}
"""Pixels of a latent cell, or of a token."""
LEAST, BUCKETS = 40, ((96, 96), (128, 64))
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
UNET_SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "EulerDiscreteScheduler": {},
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},  # draws noise in its steps, and so does the next
    "DDPMScheduler": {},
}
FLOW_SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},  # draws
    "UniPCMultistepScheduler": FLOW,  # no `scale_noise`: of a text alone
}
SCHEDULERS = {
    "sdxl": UNET_SCHEDULERS,
    "sd15": UNET_SCHEDULERS,
    "sd3": FLOW_SCHEDULERS,
    "flux": FLOW_SCHEDULERS,
}
"""By family, each with what its config says beside the folder's."""

TASKS = ("text-to-image", "image-to-image", "inpainting")

Request = Mapping[str, Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def tasks(family: str, scheduler: str) -> Sequence[str]:
    """What the family can do with that scheduler."""
    return TASKS[:1] if SCHEDULERS[family][scheduler] is FLOW else TASKS


def model_config(family: str, scheduler: str, *, fit: str, backend: str | None) -> dict[str, Any]:
    """A model's YAML; without a backend nothing is compiled."""
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 4,
        "maxBatchDelay": 20,
        "startupTimeout": 600,
        "maxRetryTimeoutInSec": 1200,
        "pt2": {
            "compile": {"enable": True, "backend": backend} if backend else {"enable": False},
            "shapes": {
                "buckets": [list(bucket) for bucket in BUCKETS],
                "batch_sizes": "dynamic",
                "fit": fit,
                "mask_only": fit == "mask",  # half the warm-up; the others are `pad`'s
            },
        },
        "pipeline": {"path": ".", "tasks": list(tasks(family, scheduler))},
    }


def build(family: str, scheduler: str, folder: Path) -> Path:
    """The family's tiny model, with that scheduler as its own."""
    tiny.build(family, folder)
    pipe = AutoPipelineForText2Image.from_pretrained(folder, use_safetensors=True)
    more = SCHEDULERS[family][scheduler]
    own = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **more)
    own.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    named = {**json.loads(index.read_text()), "scheduler": ["diffusers", scheduler]}
    index.write_text(json.dumps(named))
    return folder


def random_request(
    rng: random.Random, family: str, scheduler: str, *, sociable: bool = False
) -> Request:
    """Any size that a bucket covers, every task, 1 to 8 steps, guidance on and off; `sociable` ones
    differ in little that a run has to agree in.
    """
    bucket = rng.choice(BUCKETS)
    height, width = (rng.randint(LEAST, side) for side in bucket)
    steps = 2 if sociable else rng.randint(1, 8)
    request: dict[str, Any] = {
        "prompt": " ".join(rng.choice(["a", "cat", "by", "the", "sea"]) for _ in range(8)),
        "height": height,
        "width": width,
        "seed": rng.randrange(2**63),
        "num_inference_steps": steps,
        "guidance_scale": 5.0 if sociable else rng.choice([0.0, 1.0, 3.0, 7.5]),
    }
    if family != "flux" and not sociable and rng.random() < 0.3:
        request["negative_prompt"] = "blurry"
    task = rng.choice(tasks(family, scheduler))
    if task == "text-to-image":
        return request
    least = 1.0 if steps == 1 else 0.5
    strength = 1.0 if sociable else round(rng.uniform(least, 1.0), 2)
    request |= {"image": noise(height, width), "strength": strength}
    return request | ({"mask_image": noise(height, width, "L")} if task == "inpainting" else {})


@dataclass(slots=True)
class Tally:
    """What the requests to one model have come to."""

    num_pictures: int = 0
    worst: int = 0
    """Of all pixels, by how many of 255 one is off."""
    engines: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def compare(self, request: Request, picture: NDArray[Any], expected: NDArray[Any]) -> None:
        """Take a picture, (height, width, 3), for what diffusers paints."""
        off = int(np.abs(picture.astype(int) - expected).max())
        self.num_pictures, self.worst = self.num_pictures + 1, max(self.worst, off)
        if off > 1:
            self.findings.append(f"{off} of 255 off: {_short(request)}")


def _short(request: Request) -> str:
    return json.dumps({k: v if len(str(v)) < 60 else "..." for k, v in request.items()})


def ask(client: Client, plain: Plain, requests: Sequence[Request], clients: int) -> Tally:
    """Send the requests, so many at a time, and compare what comes."""
    tally = Tally()
    with ThreadPoolExecutor(clients) as pool:
        for request, reply in zip(requests, pool.map(client.predict, requests), strict=True):
            if reply.status != 200:
                tally.findings.append(f"{reply.status} {reply.body[:200]!r}: {_short(request)}")
                continue
            engine = reply.headers["x-preheat-engine"]
            tally.engines[engine] = tally.engines.get(engine, 0) + 1
            tally.compare(request, np.asarray(opened(reply.body)), plain.picture(request))
    state = client.state()
    for name in ("compiles_since_ready", "incidents", "eager_fallbacks"):
        if state[name]:
            tally.findings.append(f"{name}: {state[name]}")
    return tally


def campaign(
    family: str, scheduler: str, requests: Sequence[Request], clients: int, fit: str, backend: str
) -> tuple[Tally, float]:
    """The tally of a server of its own, and how many rows shared a run."""
    STATE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fit-", dir=STATE) as scratch:
        work = Path(scratch)
        model, config = build(family, scheduler, work / "model"), work / "tiny.yaml"
        config.write_text(yaml.safe_dump(model_config(family, scheduler, fit=fit, backend=backend)))
        archive = build_archive(config, model, output=work / "archives")
        with serving(archive, work, env={"OMP_NUM_THREADS": "1"}) as served:
            tally = ask(served.client, Plain(model, GRID[family]), requests, clients)
            return tally, _rows_a_run(served)


def _rows_a_run(served: Served) -> float:
    runs = served.metric("preheat_inference_seconds_count")
    rows = served.metric("preheat_rows_painted_total")
    empty = served.metric("preheat_rows_filled_total")
    return (rows - empty) / runs if runs else 0.0


@app.command()
def main(
    family: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    count: Annotated[int, typer.Option(help="Requests a family.")] = 200,
    scheduler: Annotated[list[str] | None, typer.Option(help="Default: the family's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: a new one, which is printed.")] = None,
    clients: Annotated[int, typer.Option(help="At a time; more than one: strangers.")] = 1,
    fit: Annotated[str, typer.Option(help="pt2.shapes.fit.")] = "mask",
    backend: Annotated[str, typer.Option(help="pt2.compile.backend.")] = "openvino",
) -> None:
    """Compare a server's pictures with those of diffusers alone."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    print(
        f"fit: {count} requests a family, seed {seed}, fit {fit}, {backend}, {clients} clients",
        flush=True,
    )
    findings: list[str] = []
    for each in family or list(SCHEDULERS):
        own = [name for name in SCHEDULERS[each] if not scheduler or name in scheduler]
        for index, name in enumerate(own):
            begun, rng = time.monotonic(), random.Random(f"{seed} {each} {name}")
            number = len(range(index, count, len(own)))
            requests = [
                random_request(rng, each, name, sociable=clients > 1) for _ in range(number)
            ]
            tally, rows = campaign(each, name, requests, clients, fit, backend)
            findings += [f"{each}, {name}: {finding}" for finding in tally.findings]
            print(
                f"  {each:5} {name:32} {tally.num_pictures:4} pictures, at most {tally.worst} of "
                f"255 off, {tally.engines}, {rows:.2f} rows a run, "
                f"{len(tally.findings)} findings, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    for finding in findings[:20]:
        print(finding)
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    # unwinds, so that the servers are stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    app()
