"""One loop for all that is trained here: it resumes, averages its weights and shows its curve."""

from __future__ import annotations

import copy
import csv
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from examples.shapes import workers

Model = TypeVar("Model", bound=nn.Module)
Losses = Mapping[str, torch.Tensor]
"""What a step is made better by, "loss", and whatever else its curve shall show; scalars."""


@dataclass(frozen=True)
class Plan:
    """`steps` of AdamW, warmed up and then falling along a cosine to a fiftieth of `rate`."""

    steps: int
    rate: float
    decay: float  # of the moving average of the weights
    warmup: int = 100
    keep_every: float = 300  # seconds between two checkpoints
    show_every: int = 500  # steps between two sample sheets

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.warmup)
        falling = 0.51 + 0.49 * math.cos(math.pi * min(1.0, step / self.steps))
        return self.rate * rising * falling


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that shall be at `path` whole or not at all."""
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


class Training(Generic[Model]):
    """Trains `model` in `folder`, where a checkpoint of an earlier run is continued.

    Step n draws its pictures and its noise from `random(n)` alone, so that a run that was
    interrupted sees the same ones as one that was not. Processes that train together each take
    their share of a step.
    """

    def __init__(self, folder: Path, model: Model, plan: Plan, seed: int) -> None:
        self.folder, self.model, self.plan, self._seed = folder, model, plan, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self._optimiser = torch.optim.AdamW(
            model.parameters(), lr=plan.rate, weight_decay=0.01, betas=(0.9, 0.99)
        )
        self.step = 0
        self._checkpoint = folder / "checkpoint.pt"
        if self._checkpoint.exists():
            self._load()

    def random(self, step: int) -> tuple[np.random.Generator, torch.Generator]:
        """Fresh generators that depend on the seed, the step and the process only."""
        rng = np.random.default_rng([self._seed, step, workers.rank()])
        return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))

    def run(self, losses: Callable[[int], Losses], show: Callable[[int], None]) -> Model:
        """Take what steps are left; the average of the weights."""
        first = workers.rank() == 0
        console = Console(quiet=not first)
        curve: list[dict[str, float]] = []
        kept = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task(self.folder.name, total=self.plan.steps, completed=self.step)
            while self.step < self.plan.steps:
                curve.append(self._take(losses))
                progress.update(bar, completed=self.step)
                if not first:
                    continue
                if self.step % 50 == 0:
                    self._note(curve, console)
                    curve = []
                last = self.step == self.plan.steps
                if last or self.step % self.plan.show_every == 0:
                    show(self.step)
                    self._plot()
                if last or time.monotonic() - kept > self.plan.keep_every:
                    self._save()
                    kept = time.monotonic()
        return self.average

    def _take(self, losses: Callable[[int], Losses]) -> dict[str, float]:
        for group in self._optimiser.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        self.model.train()
        measured = losses(self.step)
        self._optimiser.zero_grad()
        measured["loss"].backward()  # type: ignore[no-untyped-call]
        workers.average_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()
        self.step += 1
        decay = min(self.plan.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - decay
            )
        return {name: float(value.detach()) for name, value in measured.items()}

    def _note(self, curve: list[dict[str, float]], console: Console) -> None:
        means = {name: float(np.mean([row[name] for row in curve])) for name in curve[-1]}
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"{self.folder.name}: the loss is {means['loss']}")
        row = {"step": float(self.step), "time": time.time(), **means}
        file = self.folder / "curve.csv"
        fresh = not file.exists()
        with file.open("a", newline="") as out:
            writer = csv.DictWriter(out, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        console.print(
            f"{time.strftime('%H:%M:%S')} {self.folder.name} {self.step}/{self.plan.steps}",
            " ".join(f"{name} {value:.4f}" for name, value in means.items()),
        )

    def _plot(self) -> None:
        file = self.folder / "curve.csv"
        if not file.exists():
            return
        with file.open(newline="") as source:
            rows = list(csv.DictReader(source))
        figure, axes = plt.subplots(figsize=(8, 4))
        steps = [float(row["step"]) for row in rows]
        for name in rows[0].keys() - {"step", "time"}:
            axes.plot(steps, [float(row[name]) for row in rows], label=name, linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.legend()
        figure.savefig(self.folder / "curve.png", dpi=100, bbox_inches="tight")
        plt.close(figure)

    def _save(self) -> None:
        with appearing(self._checkpoint) as part:
            torch.save(
                {
                    "step": self.step,
                    "model": self.model.state_dict(),
                    "average": self.average.state_dict(),
                    "optimiser": self._optimiser.state_dict(),
                },
                part,
            )

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self._optimiser.load_state_dict(state["optimiser"])
