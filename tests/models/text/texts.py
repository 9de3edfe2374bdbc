"""A worker that serves a tiny language model, and requests as TorchServe brings them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from preheat.config.model import ModelConfig
from preheat.models.text.job import Answer, Job
from preheat.protocol.call import Call
from preheat.protocol.responses import Response
from preheat.status import StatusFile
from preheat.worker.metrics import Metrics
from preheat.worker.turns import Part
from preheat.worker.worker import Worker

SLOTS, BUCKETS, MAX_LENGTH = 4, (8, 32), 48


def config(path: str | Path = "tiny:llama", backend: str = "eager", **text: Any) -> ModelConfig:
    return ModelConfig.parse(
        {
            "batchSize": SLOTS,
            "continuousBatching": True,
            "pt2": {"compile": {"enable": True, "backend": backend}},
            "text": {
                "path": str(path),
                "slots": SLOTS,
                "prefill_buckets": list(BUCKETS),
                "max_length": MAX_LENGTH,
                **text,
            },
        }
    )


def start(own: ModelConfig, metrics: Metrics | None = None) -> Worker[Job, Answer]:
    status = StatusFile(None, "text")
    return Worker(own, Path("/nowhere"), torch.device("cpu"), status=status, metrics=metrics)


@dataclass
class Client:
    """Open requests of one worker, and what has come of each."""

    worker: Worker[Job, Answer]
    open: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    told: dict[str, list[Part]] = field(default_factory=dict)
    live: bool = True

    def send(self, name: str, **body: Any) -> None:
        self.open[name], self.told[name] = body, []

    def leave(self, name: str) -> None:
        del self.open[name]

    def turn(self) -> None:
        assert self.worker.turns is not None
        send = _ignored if self.live else None
        calls = {name: partial(Call, {"body": body}, {}, send) for name, body in self.open.items()}
        for name, part in self.worker.turns.take(calls).items():
            self.told[name].append(part)
            if part.last:
                self.leave(name)

    def drain(self) -> None:
        while self.open:
            self.turn()

    def body(self, name: str) -> bytes:
        return b"".join(part.response.body for part in self.told[name] if part.response)

    def code(self, name: str) -> int:
        response = self.told[name][0].response
        assert response is not None
        return response.code

    def events(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body(name).splitlines()]

    def text(self, name: str) -> str:
        return "".join(e["text"] for e in self.events(name) if e["event"] == "text")


def _ignored(_: Response) -> None:
    """Of TorchServe's own way to send a part: turns take none."""


def tokens(text: str) -> Sequence[int]:
    """Of the tiny models' tokenizer."""
    from preheat.models.text import tiny

    found: Sequence[int] = tiny.tokenizer()(text).input_ids
    return found
